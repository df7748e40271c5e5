// SPDX-License-Identifier: Apache-2.0
// Squared errors of predictions and their gradient, in blocks: what is not of the arithmetic's type A is converted into
// a buffer first, so that tensors of any types meet in one loop. Sums of a block are of A, those of a part double.
// Included by row_kernels.inl, once per instruction set.

inline int64_t place_in(const Pieces& tensor, int64_t sample, int64_t piece, int64_t i) {
  return sample * tensor.sample_stride + piece * tensor.piece_stride + i;
}

// n elements of a piece from `i` on, in A; in `buffer` where they are of another type.
template <class A>
const A* block_of(const Pieces& tensor, int64_t sample, int64_t piece, int64_t i, int64_t n, A* buffer) {
  const int64_t at = place_in(tensor, sample, piece, i);
  if (tensor.element == ElementOf<A>::value) return static_cast<const A*>(tensor.data) + at;
  read_block(tensor.data, tensor.element, at, n, A(1), buffer);
  return buffer;
}

// What of a block counts: all, nothing, or where `each` says so.
struct KeptBlock {
  bool any;
  const bool* each;
};

inline KeptBlock kept_block(const Kept& kept, int64_t sample, int64_t piece, int64_t i, int64_t n, bool* buffer) {
  if (kept.data == nullptr) return {true, nullptr};
  const bool* first = kept.data + sample * kept.sample_stride + piece * kept.piece_stride + i * kept.stride;
  if (kept.stride == 0) return {*first, nullptr};
  if (kept.stride == 1) return {true, first};
  for (int64_t k = 0; k < n; ++k) buffer[k] = first[k * kept.stride];
  return {true, buffer};
}

// visit(sample, piece, i, n) for the blocks of a part.
template <class Visit>
inline void for_blocks(int64_t unit, int64_t pieces, int64_t length, int64_t parts, const Visit& visit) {
  const int64_t sample = unit / parts, total = pieces * length;
  int64_t at = unit % parts * kErrorPart;
  const int64_t end = total - at < kErrorPart ? total : at + kErrorPart;
  int64_t piece = at / length, i = at % length;
  while (at < end) {
    int64_t n = length - i < kBlock ? length - i : kBlock;
    n = end - at < n ? end - at : n;
    visit(sample, piece, i, n);
    at += n;
    i += n;
    if (i == length) {
      ++piece;
      i = 0;
    }
  }
}

template <class A, bool kMasked>
__attribute__((noinline)) void add_errors(const A* p, const A* r, const A* t, const bool* kept, int64_t n,
                                          double* sums) {
  A gap = 0, model = 0, reference = 0;
#pragma omp simd reduction(+ : gap, model, reference)
  for (int64_t i = 0; i < n; ++i) {
    const bool counts = !kMasked || kept[i];
    const A d = counts ? p[i] - r[i] : A(0), u = counts ? r[i] - t[i] : A(0), e = counts ? p[i] - t[i] : A(0);
    gap += d * (d + 2 * u);
    model += e * e;
    reference += u * u;
  }
  sums[0] += gap;
  sums[1] += model;
  sums[2] += reference;
}

template <class A, bool kMasked>
__attribute__((noinline)) void add_error(const A* p, const A* t, const bool* kept, int64_t n, double* sums) {
  A model = 0;
#pragma omp simd reduction(+ : model)
  for (int64_t i = 0; i < n; ++i) {
    const A e = !kMasked || kept[i] ? p[i] - t[i] : A(0);
    model += e * e;
  }
  sums[1] += model;
}

template <class A>
void squared_errors(const SquaredErrors& call, int64_t begin, int64_t end) {
  alignas(64) A buffers[3][kBlock];
  bool buffer[kBlock];
  for (int64_t unit = begin; unit < end; ++unit) {
    double sums[kErrorSums] = {};
    for_blocks(unit, call.pieces, call.length, call.parts, [&](int64_t b, int64_t piece, int64_t i, int64_t n) {
      const KeptBlock kept = kept_block(call.kept, b, piece, i, n, buffer);
      if (!kept.any) return;
      const A* p = block_of(call.model, b, piece, i, n, buffers[0]);
      const A* t = block_of(call.target, b, piece, i, n, buffers[1]);
      if (call.reference.data == nullptr) {
        (kept.each == nullptr ? add_error<A, false> : add_error<A, true>)(p, t, kept.each, n, sums);
        return;
      }
      const A* r = block_of(call.reference, b, piece, i, n, buffers[2]);
      (kept.each == nullptr ? add_errors<A, false> : add_errors<A, true>)(p, r, t, kept.each, n, sums);
    });
    for (int k = 0; k < kErrorSums; ++k) call.sums[unit * kErrorSums + k] = sums[k];
  }
}

template <class A>
void error_gradient(const ErrorGradient& call, int64_t begin, int64_t end) {
  alignas(64) A buffers[2][kBlock];
  alignas(64) A values[kBlock];
  bool buffer[kBlock];
  for (int64_t unit = begin; unit < end; ++unit) {
    const A factor = static_cast<const A*>(call.factor)[unit / call.parts];
    for_blocks(unit, call.pieces, call.length, call.parts, [&](int64_t b, int64_t piece, int64_t i, int64_t n) {
      const KeptBlock kept = kept_block(call.kept, b, piece, i, n, buffer);
      const A* p = block_of(call.model, b, piece, i, n, buffers[0]);
      const A* t = block_of(call.target, b, piece, i, n, buffers[1]);
      if (!kept.any) {
        for (int64_t k = 0; k < n; ++k) values[k] = 0;
      } else if (kept.each == nullptr) {
#pragma omp simd
        for (int64_t k = 0; k < n; ++k) values[k] = factor * (p[k] - t[k]);
      } else {
#pragma omp simd
        for (int64_t k = 0; k < n; ++k) values[k] = kept.each[k] ? factor * (p[k] - t[k]) : A(0);
      }
      write_block(call.out.data, call.out.element, place_in(call.out, b, piece, i), n, values);
    });
  }
}
