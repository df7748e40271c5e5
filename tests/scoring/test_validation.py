# SPDX-License-Identifier: Apache-2.0
"""Bad input: every error names the argument, what came, what was expected, and a remedy."""

import numpy as np
import pytest
import torch

from fastpref import ScoringOptions, explain, linear_logprob


def good(**changes):
    return {
        "hidden": torch.randn(2, 3, 4),
        "weight": torch.randn(11, 4),
        "target": torch.zeros(2, 3, dtype=torch.long),
        "bias": torch.randn(11),
        **changes,
    }


NAN, INF = float("nan"), float("inf")
T, V = TypeError, ValueError
TABLE = [
    # argument, value, error, and what the message must hold, in order
    ("hidden", [[1.0]], T, "hidden.*torch.Tensor.*list"),
    ("hidden", None, T, "hidden.*torch.Tensor.*NoneType"),
    ("hidden", torch.zeros(2, 3, 4, dtype=torch.int32), T, "hidden.*float64.*int32.*cast"),
    ("hidden", torch.zeros(2, 3, 4, dtype=torch.complex64), T, "hidden.*float64.*complex64"),
    ("hidden", torch.zeros(2, 3, 5), V, r"hidden.*\(2, 3, 5\).*\(11, 4\).*\(out, in\)"),
    ("hidden", torch.zeros(()), V, r"hidden.*\(\)"),
    ("hidden", torch.zeros(2, 4), V, r"target.*\(2, 3\).*\(2, 4\).*shift"),
    ("weight", "lm_head", T, "weight.*torch.Tensor.*str"),
    ("weight", torch.zeros(11, 4, dtype=torch.int8), T, "weight.*float64.*int8; dequantise"),
    ("weight", torch.zeros(22, 1, dtype=torch.uint8), T, "weight.*float64.*uint8; dequantise"),
    ("weight", torch.zeros(11, 1, dtype=torch.int32), T, "weight.*float64.*int32; dequantise"),
    ("weight", torch.zeros(11, 4).to(torch.float8_e4m3fn), T, "weight.*e4m3fn; dequantise"),
    ("hidden", torch.zeros(2, 3, 4).to(torch.float8_e5m2), T, "hidden.*e5m2; dequantise"),
    ("weight", torch.zeros(11, 4, dtype=torch.bool), T, "weight.*float64.*bool; cast"),
    (
        "weight",
        torch.nn.Linear(4, 11),
        T,
        r"weight must be .*Tensor, got Linear; pass its \.weight",
    ),
    ("bias", torch.nn.Linear(4, 11), T, r"bias must be .*Tensor, got Linear; pass its \.bias"),
    ("lora", (torch.nn.Linear(4, 2), torch.zeros(11, 2), 1), T, r"lora's A.*Linear;.* \.weight"),
    ("lora", (torch.zeros(2, 4, dtype=torch.int8), torch.zeros(11, 2), 1), T, "A.*; dequantise"),
    ("lora", (torch.zeros(2, 4), torch.zeros(11, 2), True), T, "scale must be a number, got bool"),
    ("weight", torch.zeros(4, 11), V, r"hidden.*\(4, 11\).*\(out, in\)"),
    ("weight", torch.zeros(11), V, r"weight.*\(V, H\).*\(11,\)"),
    ("weight", torch.zeros(1, 11, 4), V, r"weight.*\(V, H\).*\(1, 11, 4\)"),
    ("weight", torch.zeros(0, 4), V, "weight.*at least one row.*0"),
    ("weight", torch.zeros(11, 4, device="meta"), V, "weight.*on cpu.*meta.*[Mm]ove"),
    ("target", [0] * 6, T, "target.*torch.Tensor.*list"),
    ("target", torch.zeros(2, 3), T, r"target.*int64.*float32.*target.long\(\)"),
    ("target", torch.zeros(2, 3, dtype=torch.bool), T, "target.*int64.*bool"),
    ("target", torch.zeros(2, 4, dtype=torch.long), V, r"target.*\(2, 4\).*\(2, 3, 4\).*shift"),
    ("target", torch.zeros(6, dtype=torch.long), V, r"target.*\(6,\).*\(2, 3, 4\)"),
    ("target", torch.zeros(2, 3, dtype=torch.long, device="meta"), V, "target.*on cpu.*meta"),
    ("bias", 1.0, T, "bias.*torch.Tensor.*float"),
    ("bias", torch.zeros(4), V, r"bias.*\(11,\).*\(4,\)"),
    ("bias", torch.zeros(1, 11), V, r"bias.*\(11,\).*\(1, 11\)"),
    ("bias", torch.zeros(11, dtype=torch.long), T, "bias.*float64.*int64"),
    ("bias", torch.zeros(11, device="meta"), V, "bias.*on cpu.*meta"),
    ("hidden", torch.zeros(2, 3, 4).to_sparse(), T, r"hidden.*dense.*sparse.*to_dense\(\)"),
    ("weight", torch.zeros(11, 4).to_sparse(), T, r"weight.*dense.*sparse.*to_dense\(\)"),
    ("ignore_index", 2**63, V, "ignore_index.*int64.*9223372036854775808"),
    ("ignore_index", None, T, "ignore_index.*int.*NoneType"),
    ("ignore_index", 1.5, T, "ignore_index.*int.*float"),
    ("temperature", 0, V, "temperature.*greater than 0.*0"),
    ("temperature", -1.0, V, "temperature.*greater than 0.*-1.0"),
    ("temperature", NAN, V, "temperature.*finite.*nan"),
    ("temperature", 1e-40, V, "temperature.*1e-15.*1e-40"),
    ("temperature", 10**400, V, "temperature.*1e-15.*1000"),
    ("softcap", 1e-46, V, "softcap.*1e-15.*1e-46"),
    ("logit_scale", 1e300, V, "logit_scale.*1e-15.*1e[+]300"),
    ("temperature", "1", T, "temperature.*number.*str"),
    ("temperature", None, T, "temperature.*number.*NoneType"),
    ("logit_scale", INF, V, "logit_scale.*finite.*inf"),
    ("logit_scale", True, T, "logit_scale.*number.*bool"),
    ("softcap", 0.0, V, "softcap.*greater than 0.*0.0.*None"),
    ("softcap", -30.0, V, "softcap.*greater than 0.*-30.0.*None"),
    ("softcap", NAN, V, "softcap.*finite.*nan"),
    ("softcap", "30", T, "softcap.*number.*str"),
    ("outputs", "logp", T, r"outputs.*tuple.*'logp'.*\('logp',\)"),
    ("outputs", ("logp", "logps"), V, "outputs.*logp, entropy.*'logps'"),
    ("outputs", ("logp", "logps"), V, "got 'logps'; did you mean 'logp'?"),
    ("outputs", "mean-logits", T, r"write \('mean_logits',\)"),
    ("outputs", (1,), V, "outputs.*logp, entropy.*1"),
    ("ignore_index", np.bool_(True), T, "ignore_index.*int.*bool"),
    ("temperature", np.bool_(True), T, "temperature.*number.*bool"),
    ("outputs", None, T, "outputs.*tuple.*NoneType"),
    ("tp_group", "tp", T, "tp_group.*ProcessGroup.*str"),
    ("vocab_range", (3, 3), V, r"vocab_range.*start < stop.*\(3, 3\)"),
    ("vocab_range", (-1, 3), V, r"vocab_range.*0 <= start.*\(-1, 3\)"),
    ("vocab_range", (0, 12), V, r"vocab_range.*at most 11.*\(0, 12\)"),
    ("vocab_range", (0, 1, 2), V, r"vocab_range.*\(start, stop\).*\(0, 1, 2\)"),
    ("vocab_range", ("a", "b"), T, "vocab_range.*ints.*str"),
    ("vocab_range", (0.5, 3), T, "vocab_range.*ints.*float"),
    ("vocab_range", (True, 3), T, "vocab_range.*ints.*bool"),
    ("vocab_range", 11, T, r"vocab_range.*\(start, stop\).*int"),
    ("options", {"backend": "cpp"}, T, "options.*ScoringOptions.*dict"),
]


def test_states_and_head_have_an_order():
    given = good()
    given["hidden"], given["weight"] = given["weight"], given["hidden"]
    for call in (linear_logprob, explain):
        with pytest.raises(ValueError, match=r"; the order is hidden, weight, target$"):
            call(**given)


@pytest.mark.parametrize("call", [linear_logprob, explain])
@pytest.mark.parametrize("argument, value, error, message", TABLE)
def test_arguments(call, argument, value, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        call(**good(**{argument: value}))


def test_a_hidden_size_of_zero():
    with pytest.raises(ValueError, match=r"weight.*one column.*\(11, 0\)"):
        linear_logprob(torch.zeros(3, 0), torch.zeros(11, 0), torch.zeros(3, dtype=torch.long))


def test_tensors_without_data():
    arguments = {name: value.to("meta") for name, value in good().items()}
    with pytest.raises(ValueError, match="hidden must hold data, got a meta tensor"):
        linear_logprob(**arguments)


def test_numbers_of_other_libraries():
    arguments = good(target=torch.tensor([[0, 1, 2], [3, 3, 5]]))
    lora = torch.randn(2, 4), torch.randn(11, 2)
    plain = {
        "ignore_index": 3,
        "temperature": 0.5,
        "logit_scale": 0.25,
        "softcap": 8.0,
        "vocab_range": (0, 10),
        "lora": (*lora, 2.0),
        "options": ScoringOptions(memory_budget=4096, chunk_rows=2, max_scored=5),
    }
    expected = linear_logprob(**arguments, **plain).logp
    of_numpy = plain | {
        "ignore_index": np.int64(3),
        "vocab_range": (np.int32(0), np.int64(10)),
        "options": ScoringOptions(
            memory_budget=np.int64(4096), chunk_rows=np.int32(2), max_scored=np.uint8(5)
        ),
    }
    assert of_numpy["options"] == plain["options"]
    assert type(of_numpy["options"].memory_budget) is int
    for number in (np.float64, np.float32, np.float16):
        numbers = {name: number(plain[name]) for name in ("temperature", "logit_scale", "softcap")}
        given = arguments | of_numpy | numbers | {"lora": (*lora, number(2.0))}
        given["weight"].requires_grad_(False)
        assert torch.equal(linear_logprob(**given).logp, expected)
        explain(**given)


@pytest.mark.parametrize(
    "option, value, error, message",
    [
        ("backend", "numpy", V, "backend.*torch.*cpp.*triton.*cuda.*'numpy'"),
        ("backend", "tritn", V, r"got 'tritn'; did you mean 'triton'\?"),
        ("backend", None, V, "backend.*None"),
        ("schedule", "Keep", V, r"got 'Keep'; did you mean 'keep'\?"),
        ("chunk_rows", np.bool_(True), T, "chunk_rows.*int.*bool"),
        ("schedule", "fast", V, "schedule.*direct.*keep.*recompute.*'fast'"),
        ("memory_budget", 0, V, "memory_budget.*positive.*0.*None"),
        ("memory_budget", -1, V, "memory_budget.*positive.*-1.*None"),
        ("memory_budget", 1e9, T, "memory_budget.*int.*float"),
        ("memory_budget", "1GB", T, "memory_budget.*int.*str"),
        ("chunk_rows", 0, V, "chunk_rows.*positive.*0"),
        ("chunk_rows", True, T, "chunk_rows.*int.*bool"),
        ("max_scored", -1, V, "max_scored.*-1"),
        ("max_scored", 2.0, T, "max_scored.*int.*float"),
    ],
)
def test_options(option, value, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        ScoringOptions(**{option: value})


def test_options_are_frozen_and_keyword_only():
    options = ScoringOptions(max_scored=0)
    with pytest.raises(AttributeError):
        options.backend = "cpp"
    with pytest.raises((AttributeError, TypeError)):
        options.backends = "cpp"
    with pytest.raises(TypeError):
        ScoringOptions("cpp")
    assert options == ScoringOptions(max_scored=0)
    assert len({options, ScoringOptions(max_scored=0)}) == 1


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_that_cannot_serve_says_why(backend, monkeypatch):
    monkeypatch.setattr("fastpref.scoring.backends.triton.INTERPRETED", False)
    options = ScoringOptions(backend=backend)
    with pytest.raises(ValueError, match=rf"backend='{backend}'.*(cpu|kernels).*backend='auto'"):
        linear_logprob(**good(), options=options)


def test_direct_where_it_cannot_serve():
    arguments = good()
    arguments["weight"].requires_grad_()
    with pytest.raises(ValueError, match=r"schedule='direct'.*schedule='auto'"):
        linear_logprob(**arguments, options=ScoringOptions(schedule="direct"))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_partitioned_parameter(name):
    """As DeepSpeed ZeRO-3 leaves it outside the module that owns it."""
    parameter = torch.nn.Parameter(torch.empty(0))
    parameter.ds_status = "NOT_AVAILABLE"
    with pytest.raises(ValueError, match=rf"{name}.*ZeRO-3.*inside the forward.*tp_group"):
        linear_logprob(**good(**{name: parameter}))


@pytest.fixture
def mesh(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_sharded_parameter(mesh, name):
    from torch.distributed.tensor import Shard, distribute_tensor

    arguments = good()
    arguments[name] = distribute_tensor(arguments[name], mesh, [Shard(0)])
    with pytest.raises(ValueError, match=rf"{name}.*DTensor.*inside the forward.*tp_group"):
        linear_logprob(**arguments)
    # A replica is a DTensor too; its local tensor is what is wanted.
    arguments[name] = arguments[name].to_local()
    linear_logprob(**arguments)


def test_good_input_is_good():
    assert linear_logprob(**good()).logp.shape == (2, 3)
    assert linear_logprob(**good(outputs=["logp"])).logp.shape == (2, 3)
    assert linear_logprob(**good(temperature=1, logit_scale=2, softcap=30)).logp.shape == (2, 3)
