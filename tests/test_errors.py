"""Every wrong argument gives a ValueError or TypeError that names it, before anything runs."""

import pytest
import torch

import nsa_ext
from nsa_ext import KVCompressor, NSAAttention, NSAConfig

B, SQ, SK, HQ, HKV, DK, DV = 2, 5, 70, 4, 2, 16, 8
CONFIG = NSAConfig(4, 2, 4, 3, 1, 1, 9)
TC = CONFIG.num_compressed(SK)


def dense():
    return {
        "q": torch.randn(B, SQ, HQ, DK),
        "k": torch.randn(B, SK, HKV, DK),
        "v": torch.randn(B, SK, HKV, DV),
        "k_cmp": torch.randn(B, TC, HKV, DK),
        "v_cmp": torch.randn(B, TC, HKV, DV),
        "k_win": torch.randn(B, SK, HKV, DK),
        "v_win": torch.randn(B, SK, HKV, DV),
        "gates": torch.randn(B, SQ, HQ, 3),
        "block_indices": torch.zeros(B, SQ, HKV, 3, dtype=torch.int32),
        "config": CONFIG,
        "seqlen_k": SK,
    }


def packed():
    """The same sequences, packed."""
    x = {
        name: value.flatten(0, 1) if isinstance(value, torch.Tensor) else value
        for name, value in dense().items()
    }
    rows = B * SK // CONFIG.block_stride
    x.pop("seqlen_k")
    return x | {
        "k_cmp": torch.randn(rows, HKV, DK),
        "v_cmp": torch.randn(rows, HKV, DV),
        "cu_seqlens_q": torch.tensor([0, SQ, 2 * SQ], dtype=torch.int32),
        "cu_seqlens_k": torch.tensor([0, SK, 2 * SK], dtype=torch.int32),
        "max_seqlen_q": SQ,
        "max_seqlen_k": SK,
    }


KEYWORDS = (
    "config", "softmax_scale", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k",
    "deterministic",
)  # fmt: skip


def keywords(x, *more):
    return {name: x[name] for name in (*KEYWORDS, *more) if name in x}


def selected(x):
    return nsa_ext.selected_attn(x["q"], x["k"], x["v"], x["block_indices"], **keywords(x))


def window(x):
    return nsa_ext.window_attn(x["q"], x["k"], x["v"], **keywords(x))


def compressed(x):
    return nsa_ext.compressed_attn(x["q"], x["k_cmp"], x["v_cmp"], **keywords(x, "seqlen_k"))


def select(x):
    return nsa_ext.select_blocks(x["q"], x["k_cmp"], **keywords(x, "seqlen_k"))


def sparse(x):
    pair = x["compress"] if "compress" in x else (x["k_cmp"], x["v_cmp"])
    return nsa_ext.sparse_attn(
        x["q"], x["k"], x["v"], x["gates"], pair, k_win=x["k_win"], v_win=x["v_win"],
        **{name: x[key] for name, key in [("k_cmp", "k_raw"), ("v_cmp", "v_raw")] if key in x},
        **keywords(x, "return_selection"),
    )  # fmt: skip


FUNCTIONS = [selected, window, compressed, select, sparse]
TAKES = {
    selected: {"q", "k", "v", "block_indices"},
    window: {"q", "k", "v"},
    compressed: {"q", "k_cmp", "v_cmp"},
    select: {"q", "k_cmp"},
    sparse: {"q", "k", "v", "k_cmp", "v_cmp", "k_win", "v_win", "gates"},
}
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


def with_stride(x):
    """The same values, the last dim not contiguous."""
    return torch.stack([x, x], dim=-1)[..., 0]


WRONG_TENSOR = {
    "a list": lambda x: x.tolist(),
    "None": lambda x: None,
    "int64": lambda x: x.to(torch.int64),
    "bool": lambda x: x.to(torch.bool),
    "complex": lambda x: x.to(torch.complex64),
    "another dtype": lambda x: x.to(torch.float64 if x.is_floating_point() else torch.int16),
    "another device": lambda x: x.to("meta"),
    "sparse": lambda x: x.to_sparse(),
    "no dims": lambda x: x.sum().to(x.dtype),
    "a dim less": lambda x: x[0],
    "a dim more": lambda x: x[None],
    "the last dim not contiguous": with_stride,
    "the last dim short": lambda x: x[..., :-1].contiguous(),
    "the last dim empty": lambda x: x[..., :0],
    "one row less": lambda x: x[..., :-1, :, :].contiguous(),
    "a row more": lambda x: torch.cat([x, x[..., :1, :, :]], dim=-3),
    "one head less": lambda x: x[..., :-1, :].contiguous(),
    "no head": lambda x: x[..., :0, :],
    "another batch": lambda x: x[:1] if x.dim() == 4 else x[:1].contiguous(),
}


# What is not wrong in itself: other arguments follow it.
def follows(function, name, wrong, is_packed):
    if name == "block_indices" and wrong in ("the last dim short", "the last dim empty"):
        return True  # any width
    if name == "q" and wrong in ("one row less", "a row more"):
        # A longer or shorter chunk of queries.
        return not is_packed and function in (window, compressed, select)
    if name == "k_cmp" and wrong == "one head less":
        return function is select  # another group size
    if name in ("k_win", "v_win") and wrong == "None":
        return True  # k and v serve
    if name in ("v", "v_cmp") and wrong == "the last dim short":
        return function in (selected, window, compressed)
    return False


@every_function
@pytest.mark.parametrize("make", [dense, packed])
@pytest.mark.parametrize("wrong", WRONG_TENSOR)
@pytest.mark.parametrize(
    "name", ["q", "k", "v", "k_cmp", "v_cmp", "k_win", "v_win", "gates", "block_indices"]
)
def test_wrong_tensor(function, name, wrong, make):
    if name not in TAKES[function]:
        return
    x = make()
    function(x)
    if follows(function, name, wrong, make is packed):
        return
    x[name] = WRONG_TENSOR[wrong](x[name])
    # A q that fits to nothing may be reported through what does not fit to it.
    named = r"\b(q|k|k_cmp|v|gates|block_indices|cu_seqlens_q)\b" if name == "q" else rf"\b{name}\b"
    with pytest.raises((TypeError, ValueError), match=named):
        function(x)


@every_function
@pytest.mark.parametrize("wrong", [(4, 2, 4, 3, 1, 1, 9), "nsa", 3, {}], ids=str)
def test_wrong_config(function, wrong):
    with pytest.raises(TypeError, match="config"):
        function({**dense(), "config": wrong})


@every_function
@pytest.mark.parametrize("wrong", ["0.1", True, 1j, float("nan"), float("inf")], ids=str)
def test_wrong_softmax_scale(function, wrong):
    with pytest.raises((TypeError, ValueError), match="softmax_scale"):
        function({**dense(), "softmax_scale": wrong})


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@every_function
@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize(
    "wrong",
    [
        [0, 1], torch.tensor([0.0, 1.0]), torch.tensor([0, 1]), torch.tensor(0, dtype=torch.int32),
        torch.zeros(1, 3, dtype=torch.int32), int32(), int32(0, 5), int32(0, 5, 10, 10),
        torch.zeros(3, dtype=torch.int32, device="meta"), int32(0, 9, 5, 9, 10)[::2],
    ],
    ids=["list", "float", "int64", "scalar", "2-d", "empty", "short", "long", "device", "strided"],
)  # fmt: skip
def test_wrong_cu_seqlens(function, which, wrong):
    # cu_seqlens_q and cu_seqlens_k may each be the one that does not fit to the other.
    with pytest.raises((TypeError, ValueError), match=r"cu_seqlens_[qk]"):
        function({**packed(), f"cu_seqlens_{which}": wrong})


@every_function
@pytest.mark.parametrize("which", ["q", "k"])
def test_wrong_offsets(function, which):
    """On the CPU the values are checked too."""
    total = B * (SQ if which == "q" else SK)
    half = total // 2
    for values in [
        (1, half, total), (0, half, total - 20), (0, half, total + 20), (-3, half, total),
        (0, total + 1, total), (0, -1, total),
    ]:  # fmt: skip
        with pytest.raises((ValueError, RuntimeError), match=f"cu_seqlens_{which}"):
            function({**packed(), f"cu_seqlens_{which}": int32(*values)})
    with pytest.raises((ValueError, RuntimeError), match=f"seqlens?_{which}"):
        function({**packed(), f"max_seqlen_{which}": half - 1})


@every_function
@pytest.mark.parametrize("which", ["q", "k"])
def test_cu_seqlens_go_together(function, which):
    x = packed()
    del x[f"cu_seqlens_{which}"]
    with pytest.raises((TypeError, ValueError), match="cu_seqlens"):
        function(x)


@every_function
@pytest.mark.parametrize("which", ["q", "k"])
@pytest.mark.parametrize("wrong", [-1, 2.5, "7", torch.tensor(5)], ids=str)
def test_wrong_max_seqlen(function, which, wrong):
    with pytest.raises((TypeError, ValueError), match=f"max_seqlen_{which}"):
        function({**packed(), f"max_seqlen_{which}": wrong})


@every_function
@pytest.mark.parametrize("name", ["max_seqlen_q", "max_seqlen_k"])
def test_max_seqlen_is_for_packed_calls(function, name):
    with pytest.raises((TypeError, ValueError), match=name):
        function({**dense(), name: 5})


@pytest.mark.parametrize("function", [compressed, select], ids=lambda f: f.__name__)
@pytest.mark.parametrize("wrong", [-1, 2.5, "7", 71 + CONFIG.block_stride, 9], ids=str)
def test_wrong_seqlen_k(function, wrong):
    """Among them lengths that k_cmp's number of rows contradicts."""
    with pytest.raises((TypeError, ValueError), match=r"seqlen_k|k_cmp"):
        function({**dense(), "seqlen_k": wrong})
    with pytest.raises((TypeError, ValueError), match="seqlen_k"):
        function({**packed(), "seqlen_k": SK})


@pytest.mark.parametrize("wrong", [None, 7, "mlp", (), (1, 2), [1, 2], torch.zeros(3)], ids=str)
def test_wrong_compress(wrong):
    with pytest.raises((TypeError, ValueError), match=r"compress|k_cmp"):
        sparse({**dense(), "compress": wrong})


def test_raw_keys_beside_compressed_ones():
    """k_cmp and v_cmp are the raw K and V of the compressed branch: no use for a given pair."""
    x = dense()
    with pytest.raises((TypeError, ValueError), match="k_cmp"):
        sparse({**x, "k_raw": x["k"], "v_raw": x["v"]})


def test_compressor_of_another_config():
    phi = KVCompressor(DK, DV, config=NSAConfig(8, 2, 8, 3, 1, 1, 9))
    with pytest.raises(ValueError, match="config"):
        sparse({**dense(), "compress": phi})


def test_gates_of_two_branches():
    x = dense()
    with pytest.raises(ValueError, match="gates"):
        sparse({**x, "gates": x["gates"][..., :2].contiguous()})


def test_query_heads_are_a_multiple_of_the_key_heads():
    x = dense()
    x["q"] = torch.randn(B, SQ, 3, DK)
    for function in (window, compressed, select, selected):
        with pytest.raises(ValueError, match=r"\b(q|k|k_cmp|heads)\b"):
            function(x)


# Compression and the modules.


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"kind": "max"}, "kind"),
        ({"kind": None}, "kind"),
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": 2.0}, "head_dim"),
        ({"head_dim_v": -1}, "head_dim_v"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"hidden": 0}, "hidden"),
        ({"config": "nsa"}, "config"),
        ({"dtype": torch.int32}, "dtype"),
    ],
    ids=str,
)
def test_wrong_compressor(change, name):
    with pytest.raises((TypeError, ValueError), match=name):
        KVCompressor(**{"head_dim": 16, **change})


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize(
    "wrong", [w for w in WRONG_TENSOR if w not in ("another dtype", "one head less", "no head")]
)
@pytest.mark.parametrize("make", [dense, packed])
def test_wrong_tensor_of_compression(name, wrong, make):
    x = make()
    phi = KVCompressor(DK, DV, config=CONFIG)
    offsets = {"cu_seqlens_k": x.get("cu_seqlens_k"), "max_seqlen_k": x.get("max_seqlen_k")}
    tensors = {"k": x["k"], "v": x["v"]}
    nsa_ext.compress_kv(**tensors, compress=phi, **offsets)
    tensors[name] = WRONG_TENSOR[wrong](tensors[name])
    with pytest.raises((TypeError, ValueError), match=r"\b[kv]\b"):
        nsa_ext.compress_kv(**tensors, compress=phi, **offsets)


def test_wrong_number_of_heads_of_compression():
    phi = KVCompressor(DK, DV, config=CONFIG, num_kv_heads=3)
    x = dense()
    with pytest.raises(ValueError, match="heads"):
        nsa_ext.compress_kv(x["k"], x["v"], phi)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"dim": 0}, "dim"),
        ({"num_heads": 3}, "num_heads"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"head_dim": -1}, "head_dim"),
        ({"head_dim": 15}, "head_dim"),  # RoPE needs pairs
        ({"compress": "max"}, "compress|kind"),
        ({"config": None}, "config"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": "big"}, "rope_theta"),
    ],
    ids=str,
)
def test_wrong_attention_module(change, name):
    arguments = {"dim": 32, "num_heads": 4, "num_kv_heads": 2, "config": CONFIG, **change}
    with pytest.raises((TypeError, ValueError), match=name):
        NSAAttention(**arguments)


@pytest.mark.parametrize("shape", [(2, 9, 31), (9,), (2, 3, 9, 32), (9, 32)], ids=str)
def test_wrong_input_of_the_module(shape):
    module = NSAAttention(32, 4, 2, config=CONFIG)
    with pytest.raises((TypeError, ValueError), match=r"\bx\b"):
        module(torch.randn(shape))


# Direct calls of the operators raise; they never crash.

OPS = {
    "window_attn_fwd": lambda x: (x["q"], x["k"], x["v"], *offsets(x), 9, 0.25, False),
    "selected_attn_fwd": lambda x: (
        x["q"], x["k"], x["v"], x["block_indices"], *offsets(x), 4, 0.25, False,
    ),
    "compressed_attn_fwd": lambda x: (
        x["q"], x["k_cmp"], x["v_cmp"], *offsets(x), CONFIG.as_list(), 0.25, False,
    ),
    "select_blocks": lambda x: (x["q"], x["k_cmp"], *offsets(x), CONFIG.as_list(), 0.25),
    "sparse_attn_fwd": lambda x: (
        x["q"], x["k_cmp"], x["v_cmp"], x["k"], x["v"], x["k_win"], x["v_win"], x["gates"],
        *offsets(x), CONFIG.as_list(), 0.25, True, False,
    ),
    "window_attn_bwd": lambda x: (
        x["dout"], x["q"], x["k"], x["v"], x["dout"], x["lse"], *offsets(x), 9, 0.25, False,
    ),
    "selected_attn_bwd": lambda x: (
        x["dout"], x["q"], x["k"], x["v"], x["dout"], x["lse"], x["block_indices"], *offsets(x), 4,
        0.25, False,
    ),
    "compressed_attn_bwd": lambda x: (
        x["dout"], x["q"], x["k_cmp"], x["v_cmp"], x["dout"], x["lse"], *offsets(x),
        CONFIG.as_list(), 0.25, False,
    ),
    "sparse_attn_bwd": lambda x: (
        x["dout"], x["q"], x["k_cmp"], x["v_cmp"], x["k"], x["v"], x["k_win"], x["v_win"],
        x["gates"], x["dout"].expand(3, *x["dout"].shape), x["lse"].expand(3, *x["lse"].shape),
        x["block_indices"], *offsets(x), CONFIG.as_list(), 0.25, False,
    ),
    "compress_pool_fwd": lambda x: (x["k"], x["weight"], x["pos"], *offsets(x)[1::2], 4, 2),
    "compress_pool_bwd": lambda x: (
        x["k_cmp"], x["k"], x["weight"], x["pos"], *offsets(x)[1::2], 4, 2,
    ),
    "compress_mlp_fwd": lambda x: (
        x["k"], x["pos"], x["w1"], x["b1"], x["w2"], x["b2"], *offsets(x)[1::2], 4, 2,
    ),
    "compress_mlp_bwd": lambda x: (
        x["k_cmp"], x["k"], x["pos"], x["w1"], x["b1"], x["w2"], x["b2"], *offsets(x)[1::2], 4, 2,
    ),
}  # fmt: skip


def offsets(x):
    return (
        x.get("cu_seqlens_q"), x.get("cu_seqlens_k"), x.get("max_seqlen_q", SQ),
        x.get("max_seqlen_k", SK),
    )  # fmt: skip


def op_tensors(make):
    x = make()
    dout = torch.randn(*x["q"].shape[:-1], DV)
    lse = torch.randn(B, HQ, SQ) if make is dense else torch.randn(HQ, B * SQ)
    return x | {
        "dout": dout, "lse": lse, "weight": torch.randn(1, 4), "pos": torch.randn(1, 4, DK),
        "w1": torch.randn(1, 6, 4 * DK), "b1": torch.randn(1, 6), "w2": torch.randn(1, DK, 6),
        "b2": torch.randn(1, DK),
    }  # fmt: skip


@pytest.mark.parametrize("make", [dense, packed])
@pytest.mark.parametrize("op", OPS)
def test_wrong_tensors_of_operators(op, make):
    """Each tensor of each operator, wrong in each way, raises."""
    function = getattr(torch.ops.nsa_ext, op)
    x = op_tensors(make)
    used = set()

    class Recording(dict):
        def __getitem__(self, name):
            used.add(name)
            return super().__getitem__(name)

    function(*OPS[op](Recording(x)))
    for name in sorted(used):
        for wrong, change in WRONG_TENSOR.items():
            try:
                changed = change(x[name])
            except (IndexError, RuntimeError):
                continue  # the tensor is too small for this change
            if not isinstance(changed, torch.Tensor) or metadata(changed) == metadata(x[name]):
                continue  # an absent optional tensor, or no change
            if accepted(op, name, wrong, make is packed):
                function(*OPS[op]({**x, name: changed}))
                continue
            try:
                function(*OPS[op]({**x, name: changed}))
            except (RuntimeError, TypeError, ValueError):
                continue
            pytest.fail(f"{op} accepted {name} with {wrong}: {tuple(changed.shape)}")


def metadata(x):
    stride = None if x.is_sparse else x.stride()
    return x.shape, x.dtype, x.device, x.layout, stride


def accepted(op, name, wrong, is_packed):
    """Changes that make another call, not a wrong one."""
    rows = wrong in ("one row less", "a row more")
    if name == "q":
        # The lengths of a dense call are those of its tensors.
        return rows and not is_packed and op in (
            "window_attn_fwd", "compressed_attn_fwd", "select_blocks",
        )  # fmt: skip
    if name == "k_cmp" and op == "select_blocks":
        return wrong == "one head less"
    if name == "k" and op.startswith("compress_"):
        # 69 to 71 keys: 33 to 34 tokens, which a given dout tells apart.
        rows = rows or wrong == "another batch"
        free_rows = rows if op.endswith("fwd") else wrong == "a row more"
        free_heads = wrong in ("one head less", "no head") and op.endswith("fwd")
        return (free_rows and not is_packed) or free_heads
    if name == "block_indices":
        return wrong == "the last dim short" and op.startswith("selected")
    if name in ("v", "v_cmp"):
        return wrong == "the last dim short" and op in (
            "window_attn_fwd", "selected_attn_fwd", "compressed_attn_fwd",
        )  # fmt: skip
    return False


@pytest.mark.parametrize("op", ["compressed_attn_fwd", "select_blocks", "sparse_attn_fwd"])
@pytest.mark.parametrize(
    "config",
    [[], [4, 2, 4, 3, 1, 1], [4, 2, 4, 3, 1, 1, 9, 9], [0, 2, 4, 3, 1, 1, 9], [4, 0, 4, 3, 1, 1, 9],
     [4, 2, 0, 3, 1, 1, 9], [4, 3, 4, 3, 1, 1, 9], [4, 2, 5, 3, 1, 1, 9], [8, 2, 4, 3, 1, 1, 9],
     [4, 2, 4, 0, 1, 1, 9], [4, 2, 4, 3, -1, 1, 9], [4, 2, 4, 3, 1, -1, 9], [4, 2, 4, 3, 2, 2, 9],
     [4, 2, 4, 2**40, 1, 1, 9]],
    ids=str,
)  # fmt: skip
def test_wrong_config_of_operators(op, config):
    arguments = [config if a == CONFIG.as_list() else a for a in OPS[op](op_tensors(dense))]
    with pytest.raises(RuntimeError):
        getattr(torch.ops.nsa_ext, op)(*arguments)


@pytest.mark.parametrize("window", [0, -1, 2**40])
def test_wrong_window_of_the_operator(window):
    arguments = list(OPS["window_attn_fwd"](op_tensors(dense)))
    arguments[-3] = window
    with pytest.raises(RuntimeError):
        torch.ops.nsa_ext.window_attn_fwd(*arguments)


@pytest.mark.parametrize("size", [0, -1, 2**40])
def test_wrong_select_size_of_the_operator(size):
    arguments = list(OPS["selected_attn_fwd"](op_tensors(dense)))
    arguments[-3] = size
    with pytest.raises(RuntimeError):
        torch.ops.nsa_ext.selected_attn_fwd(*arguments)


def test_second_derivatives_say_that_they_do_not_exist():
    x = dense()
    q = x["q"].requires_grad_()
    (dq,) = torch.autograd.grad(window(x).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivatives"):
        torch.autograd.grad(dq.sum(), q)
