// SPDX-License-Identifier: Apache-2.0
// What the row kernels take, and the tables of them that the instruction sets fill in.
//
// A tile is (rows, cols) of raw products z = hidden . weight, one contiguous row at a time. The logit of a product is
//     t = scale * (z + bias),  or with a cap  t = cap * tanh(scale * (z + bias) / cap),
// times the row's factor where there is one.
#pragma once

#include <cstdint>

namespace fastpref::cpu {

enum class Element : int { float64 = 0, float32 = 1, bfloat16 = 2, float16 = 3 };
constexpr int kElements = 4;

// Statistics and bias are double for float64 tiles and float for all others.
struct LogitMap {
  const void* bias;  // (cols,) or null
  double scale;
  double cap;                    // 0: none
  const void* factor = nullptr;  // (rows,), the statistics' type, or null: 1
};

struct Tile {
  void* data;
  int64_t rows, cols, row_stride;
  const int64_t* target;  // (rows,), column of the target inside this tile; outside [0, cols): not here
};

// Rows of `sums`: those of every call, then the statistics where they are asked for, in the order of
// fastpref/scoring/statistics.py. What is summed under a cap alone comes last.
enum RowSum : int { kAnchor, kSum, kOffset, kSums, kBest = kSums, kWeighted, kSquares, kTotal, kAllSums };

// Per row, all of the statistics' type.
struct ExpRows {
  Tile tile;
  LogitMap map;
  const void* anchor;   // (rows,) first choice of anchor
  void* sums;           // (kSums, kTotal or kAllSums, rows)
  int64_t* best_index;  // (rows,), null without statistics
  bool write;
};

struct LogitGrad {
  Tile tile;
  LogitMap map;
  const void* anchor;        // (rows,)
  const void* norm;          // (rows,), p_v = exp(t_v - anchor) / norm
  const void* logp;          // (rows,)
  const void* grad_logp;     // (rows,)
  const void* grad_lse;      // (rows,) or null
  const void* grad_entropy;  // (rows,) or null
  const void* entropy;       // (rows,), read with grad_entropy only
};

// raw[i] = hidden[i] . weight[y] + bias[y] and its logit, y = target[i]; -1 and NaN where y is no row of the weight
struct TargetLogits {
  const void* hidden;
  const void* weight;
  int64_t hidden_stride, weight_stride, width, vocab;
  LogitMap map;
  const int64_t* target;  // (rows,)
  int64_t* column;        // (rows,), y or -1
  void* raw;              // (rows,), the statistics' type, as is
  void* logit;
};

// Of each row, all of the statistics' type.
constexpr int kRowScores = 5;  // logp, anchor, norm, log_norm, scale

struct SettleRows {
  const void* anchor;
  const void* sum;
  const void* offset;
  const void* best;  // or null
  const int64_t* column;
  const void* raw;
  const void* logit;
  LogitMap map;  // without bias
  void* exps;    // (rows, cols), one contiguous row at a time, or null
  int64_t rows, exps_stride;
  void* scores;  // (kRowScores, rows)
};

// out[to[i], :] = factor[i] in[from[i], :], rounded once
struct ScaleRows {
  const void* in;
  void* out;
  int64_t in_stride, out_stride, width;
  const void* factor;             // (rows,), the statistics' type
  const int64_t* from = nullptr;  // (rows,) or null: i; on CPU alone
  const int64_t* to = nullptr;    // the same
};

// The numbers are the operator's.
enum class Divergence : int { forward_kl = 0, reverse_kl = 1, jsd = 2, tv = 3, bhattacharyya = 4, cosine = 5 };
constexpr int kDivergences = 6;

// Between the rows of two tiles of raw products.
struct DivergenceRows {
  void* student;
  const void* teacher;
  int64_t rows, cols, student_stride, teacher_stride;
  LogitMap student_map, teacher_map;
  Divergence kind;
  double beta;  // read by jsd only
  void* out;    // (rows,), the statistics' type
  bool write;   // the student's tile becomes the gradient
};

// A tensor (samples, pieces, length) whose elements lie next to each other within a piece.
struct Pieces {
  void* data;  // null: there is none
  Element element;
  int64_t sample_stride, piece_stride;
};

// Which elements count; null: all.
struct Kept {
  const bool* data;
  int64_t sample_stride, piece_stride, stride;
};

// A sample is walked in parts of so many elements, whatever the number of threads: its sums are the same with any.
constexpr int64_t kErrorPart = 16384;

// Of each part: the sums of d (d + 2 (reference - target)), d = model - reference; (model - target)^2; and
// (reference - target)^2. Without a reference the second alone.
constexpr int kErrorSums = 3;

struct SquaredErrors {
  Pieces model, reference, target;
  Kept kept;
  int64_t pieces, length, parts;
  double* sums;  // (samples, parts, kErrorSums)
};

// out = factor[sample] (model - target), 0 where left out, rounded once
struct ErrorGradient {
  Pieces model, target, out;  // the elements of `out` are those of `model`
  Kept kept;
  int64_t pieces, length, parts;
  const void* factor;  // (samples,), of the arithmetic's type
};

// Of one type of elements: rows, or units of work, [begin, end).
struct RowKernels {
  void (*exp_rows)(const ExpRows&, int64_t begin, int64_t end);
  void (*logit_grad)(const LogitGrad&, int64_t begin, int64_t end);
  void (*target_logits)(const TargetLogits&, int64_t begin, int64_t end);
  void (*settle_rows)(const SettleRows&, int64_t begin, int64_t end);
  void (*scale_rows)(const ScaleRows&, int64_t begin, int64_t end);
  void (*divergence_rows)(const DivergenceRows&, int64_t begin, int64_t end);
  // Of parts, all samples' one after the other, whatever their elements: in double where a tensor is, else in float.
  void (*squared_errors)(const SquaredErrors&, int64_t begin, int64_t end);
  void (*error_gradient)(const ErrorGradient&, int64_t begin, int64_t end);
};

extern const RowKernels row_kernels_baseline[kElements];
#if defined(__x86_64__)
// Not of float64, which is there to check the others and would be half of the code.
extern const RowKernels row_kernels_avx2[kElements];
extern const RowKernels row_kernels_avx512[kElements];
#endif

}  // namespace fastpref::cpu
