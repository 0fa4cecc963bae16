"""
A stand-in for the package humming where there is no GPU: the functions that the plugin calls, in plain torch.

It takes what humming takes, and complains where humming would; what it makes of a weight is a layout of its own. Values
are those that humming multiplies with: weights of groups are rounded to bfloat16, and so are sums before the scale of a
row, and a float8_e8m0fnu byte is read as an exponent field. Codes of x are multiplied in float32, which is more than
tensor cores have, and each 128 by their scales, where they are given so.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from types import ModuleType

import torch

from quantplug.codes import FLOAT4_E2M1FN_VALUES


@dataclass(frozen=True)
class LayerConfig:
    shape_n: int
    shape_k: int
    pad_shape_n: int
    pad_shape_k: int
    b_dtype: str
    a_dtype: str
    c_dtype: str
    bs_dtype: str
    weight_scale_group_size: int
    weight_scale_type: str | None
    has_zero_point: bool
    has_bias: bool
    input_scale_group_size: int = 0
    weight_scale_group_size_n: int = 0
    num_experts: int = 0

    def to_str(self) -> str:
        return json.dumps(asdict(self))


def pack_weight(codes: torch.Tensor, bits: int) -> torch.Tensor:
    assert codes.dtype == torch.int32
    assert codes.is_contiguous()
    parts = codes.view(*codes.shape[:-1], -1, 32 // bits).to(torch.int64)
    words = (parts << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    fields = words.to(torch.int64).unsqueeze(-1) >> torch.arange(0, 32, bits) & (1 << bits) - 1
    return fields.reshape(*words.shape[:-1], -1)


def transform_humming_tensors(config, tensors, already_padded):
    assert already_padded
    groups = config.shape_k // (config.weight_scale_group_size or config.shape_k)
    bits = 8 if "8" in config.b_dtype else 4
    assert tensors["weight"].shape == (config.shape_n, config.shape_k * bits // 32)
    assert tensors["weight"].dtype == torch.int32
    scale = tensors["weight_scale"]
    if config.weight_scale_type == "tensor":
        assert scale.shape == (1,)
        assert scale.dtype == torch.float32
    elif config.weight_scale_group_size_n:
        assert scale.shape == (config.shape_n // config.weight_scale_group_size_n, groups)
        assert scale.dtype == torch.float32
    else:
        assert scale.shape == (config.shape_n, groups)
        assert str(scale.dtype) == {"e8m0": "torch.float8_e8m0fnu"}.get(config.bs_dtype, "torch.bfloat16")
    return dict(tensors)


def transform_humming_bias(bias: torch.Tensor) -> torch.Tensor:
    return bias.flip(0)


def decode(config, weight, scales, zeros):
    """Return the values that are multiplied, before a scale of a row or of the whole, `[N, K]`, and that scale."""
    codes = unpack(weight, 8 if "8" in config.b_dtype else 4)
    match config.b_dtype:
        case "float8e4m3":
            values = codes.to(torch.uint8).view(torch.float8_e4m3fn).float()
        case "float4e2m1":
            values = torch.tensor(FLOAT4_E2M1FN_VALUES)[codes]
        case _:
            values = codes.float() - (8 if config.b_dtype == "uint4" else 128)
            if config.has_zero_point:
                groups = unpack(zeros.t(), 4).t().float()
                values = codes.float() - groups.repeat_interleave(config.weight_scale_group_size, 1)
    if config.weight_scale_group_size_n:
        size = config.weight_scale_group_size
        return values * scales.repeat_interleave(128, 0).repeat_interleave(size, 1), torch.ones(1)
    if not config.weight_scale_group_size:
        return values, scales.float().reshape(1, -1) if config.weight_scale_type != "tensor" else scales.float()
    if config.bs_dtype == "e8m0":
        exponents = scales.view(torch.uint8).to(torch.int32)
        factors = (exponents << 23).view(torch.float32)
    else:
        factors = scales.float()
    values = values * factors.repeat_interleave(config.weight_scale_group_size, 1)
    return values.bfloat16().float(), torch.ones(1)


def product(config, x, x_scales, weight, scales, zeros, bias):
    """Return `[M, N]` as humming stores it."""
    values, scale = decode(config, weight, scales, zeros)
    x = torch.nn.functional.pad(x.float(), (0, config.pad_shape_k))
    if x_scales is not None:
        x = x * x_scales.repeat_interleave(config.input_scale_group_size or config.shape_k, 1)
    y = x @ values.t()
    sums = y if config.weight_scale_type == "tensor" else y.bfloat16().float()
    y = (sums * scale).bfloat16()
    if bias is not None:
        y = y + bias.flip(0)
    return y[:, : config.shape_n - config.pad_shape_n]


class HummingKernel:
    """What humming compiles, known to its launcher by a number."""

    made: list[tuple[str, str, str]] = []

    @classmethod
    def prepare_kernels(cls, layer_config, compute_config, tuning_config, device):
        assert device == 0
        cls.made.append((layer_config, compute_config or "{}", tuning_config))
        return torch.tensor([0, 1 << 30, len(cls.made) - 1, 0], dtype=torch.int64)


def launch_kernel(
    configs, a, b, bs, bs2, as_, as2, bzp, bias, c, sorted_ids, expert_ids, num_tokens_padded, expert_layout, locks,
    top_k, valid_shape_m, should_check_tensor=True,
):  # fmt: skip
    assert all(each is None for each in (bs2, as_, as2, c, sorted_ids, expert_ids, num_tokens_padded, expert_layout))
    assert (top_k, valid_shape_m, should_check_tensor) == (1, 0, True)
    layer_config, compute_config, tuning_config = HummingKernel.made[int(configs[2])]
    settings = {"layer_config": layer_config, "compute_config": compute_config, "tuning_config": tuning_config}
    return humming_gemm(
        **settings, inputs=a, weight=b, weight_scale=bs, zero_point=bzp, bias=bias, locks=locks
    ).contiguous()


torch.library.define(
    "humming::launch_kernel",
    "(Tensor configs, Tensor a, Tensor b, Tensor bs, Tensor? bs2, Tensor? as_, Tensor? as2, Tensor? bzp, Tensor? bias, "
    "Tensor? c, Tensor? sorted_ids, Tensor? expert_ids, Tensor? num_tokens_padded, Tensor? expert_layout, "
    "Tensor? locks, SymInt top_k, SymInt valid_shape_m, bool should_check_tensor = True) -> Tensor",
)
torch.library.impl("humming::launch_kernel", "CPU", launch_kernel)


def humming_gemm(
    *, layer_config, tuning_config, inputs, weight, weight_scale, zero_point, bias, locks, compute_config="{}",
    input_scale=None, sorted_ids=None, expert_ids=None, num_tokens_padded=None, top_k=1,
):  # fmt: skip
    config = LayerConfig(**json.loads(layer_config))
    tuning = json.loads(tuning_config)
    assert inputs.is_contiguous()
    assert inputs.shape[1] == config.shape_k - config.pad_shape_k
    assert (config.has_bias, config.has_zero_point) == (bias is not None, zero_point is not None)
    assert not locks.any()
    assert all(each.data_ptr() % 16 == 0 for each in (inputs, locks))
    check_x(config, inputs, input_scale)
    if sorted_ids is None:
        assert (compute_config, config.num_experts) == ("{}", 0)
        return product(config, inputs, input_scale, weight, weight_scale, zero_point, bias)
    assert json.loads(compute_config) == {"gemm_type": "indexed"}
    assert not tuning["use_pdl"]
    assert sorted_ids.data_ptr() % 16 == 0
    assert weight.shape[0] == weight_scale.shape[0] == config.num_experts
    rows, total = tuning["block_shape"][0], int(num_tokens_padded)
    assert total % rows == 0
    assert total <= len(sorted_ids)
    assert total // rows <= len(expert_ids)
    count = len(inputs) * top_k
    y = torch.full((count, config.shape_n - config.pad_shape_n), torch.nan, dtype=torch.bfloat16)
    for block in range(total // rows):
        expert = int(expert_ids[block])
        ids = sorted_ids[block * rows : (block + 1) * rows].to(torch.int64)
        assert bool(((ids >= 0) & (ids <= count)).all())
        ids = ids[ids < count]
        of_expert = [None if each is None else each[expert] for each in (weight, weight_scale, zero_point, bias)]
        assert bool(y[ids].isnan().all()), "a choice is in two blocks"
        rows_of = ids // top_k
        scales = None if input_scale is None else input_scale[rows_of]
        y[ids] = product(config, inputs[rows_of], scales, *of_expert)
    return y


def check_x(config, x, scales):
    if config.a_dtype == "bfloat16":
        assert (x.dtype, scales, config.input_scale_group_size) == (torch.bfloat16, None, 0)
        return
    assert (config.a_dtype, x.dtype) == ("float8e4m3", torch.float8_e4m3fn)
    groups = config.shape_k // (config.input_scale_group_size or config.shape_k)
    assert (scales.dtype, scales.shape) == (torch.float32, (len(x), groups))
    assert scales.is_contiguous()
    assert scales.untyped_storage().nbytes() >= 4 * groups * (-(-len(x) // 4) * 4), "it is read by four rows"
    if config.weight_scale_group_size_n:
        assert config.input_scale_group_size == config.weight_scale_group_size == 128


class Heuristics:
    """Of a device: numbers of rows that are near each other share a kernel."""

    @staticmethod
    def get_shape_m_sample(config, choices):
        return -(-choices // 8) * 8


def get_heuristics_config(config, *, shape_m, gemm_type, device):
    assert (gemm_type, device, shape_m % 8) == ("indexed" if config.num_experts else "dense", 0, 0)
    rows = 8 if shape_m < 64 else 24
    return {"block_shape": [rows, 128, 64], "use_pdl": True}


def modules() -> dict[str, ModuleType]:
    """Return the package and its modules by name."""
    contents = {
        "humming": {"__version__": "0.1.19"},
        "humming.dtypes": {"DataType": type("DataType", (), {"from_str": staticmethod(str)}), "float8e8m0": "e8m0",
                           "float32": "float32"},
        "humming.config": {"LayerConfig": LayerConfig},
        "humming.kernel": {},
        "humming.kernel.humming": {"HummingKernel": HummingKernel},
        "humming.ops": {"pack_weight": pack_weight, "humming_gemm": humming_gemm},
        "humming.transform": {"transform_humming_tensors": transform_humming_tensors,
                              "transform_humming_bias": transform_humming_bias},
        "humming.tune": {"get_heuristics_config": get_heuristics_config,
                         "get_heuristics_class": lambda device: Heuristics},
    }  # fmt: skip
    made = {}
    for name, content in contents.items():
        made[name] = ModuleType(name)
        vars(made[name]).update(content)
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(made[parent], child, module)
    return made
