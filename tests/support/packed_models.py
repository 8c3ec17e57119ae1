"""Tiny checkpoints in the formats of quantized models, made by code that shares nothing with ours:
the formats' own libraries, transformers', or a packer by the formats' documents.
"""

import json
import shutil

import torch
from safetensors.torch import load_file, save_file

E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
LARGEST_E4M3 = 448.0


def repack(model, output, pack, settings, skip=("embed", "lm_head", "norm", "mlp.gate.")):
    """Write a checkpoint whose matrices are packed; all other files are the model's.

    Args:
        pack: name and matrix -> tensors to store instead, by name.
        settings: `quantization_config`.
        skip: parts of names that stay as they are.
    """
    shutil.copytree(model, output)
    stored = {}
    for name, value in load_file(model / "model.safetensors").items():
        whole = value.ndim < 2 or any(part in name for part in skip)
        stored |= {name: value} if whole else pack(name, value)
    save_file(
        {name: value.contiguous() for name, value in stored.items()},
        output / "model.safetensors",
        metadata={"format": "pt"},
    )
    config = json.loads((output / "config.json").read_text())
    config["quantization_config"] = settings
    (output / "config.json").write_text(json.dumps(config))
    return output


def blocks_of(value, rows, columns):
    """[row blocks, rows, column blocks, columns] of a matrix, filled up with zeros."""
    fill = (-value.shape[1] % columns, -value.shape[0] % rows)
    value = torch.nn.functional.pad(value, (0, fill[0], 0, fill[1]))
    return value.view(value.shape[0] // rows, rows, -1, columns)


def fp8_blocks(block, scale_dtype=torch.float32):
    """Packer of `fp8`; scales of one byte are powers of two."""

    def pack(name, value):
        tiles = blocks_of(value, *block)
        scales = tiles.abs().amax((1, 3)) / LARGEST_E4M3
        if scale_dtype.itemsize == 1:
            scales = torch.exp2(torch.ceil(torch.log2(scales)))
        codes = (tiles / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        codes = codes.float().reshape(tiles.shape[0] * block[0], -1).to(torch.float8_e4m3fn)
        codes = codes[: value.shape[0], : value.shape[1]]
        return {name: codes, f"{name}_scale_inv": scales.to(scale_dtype)}

    return pack


def fp8_whole(name, value):
    """Packer of `fp8` without blocks: one scale."""
    scale = value.abs().max() / LARGEST_E4M3
    return {name: (value / scale).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}


def nearest_e2m1(values):
    """Codes of the nearest 4-bit floats."""
    codes = (values.abs().unsqueeze(-1) - E2M1).abs().argmin(-1)
    return (codes + 8 * (values < 0)).to(torch.uint8)


def mxfp4(name, value):
    """Packer of `mxfp4`: [experts, inputs, outputs] to blocks of 32 inputs."""
    if value.ndim != 3:
        return {name: value}
    groups = value.transpose(1, 2).unflatten(-1, (-1, 32))
    exponents = torch.floor(torch.log2(groups.abs().amax(-1))) - 2
    codes = nearest_e2m1((groups / torch.exp2(exponents)[..., None]).clamp(-6, 6))
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    return {f"{name}_blocks": packed, f"{name}_scales": (exponents + 127).to(torch.uint8)}


def compressed(preset, **changes):
    """Settings and packer of compressed-tensors itself, of one of its schemes."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import preset_name_to_scheme

    scheme = preset_name_to_scheme(preset, ["Linear"])
    scheme.weights = scheme.weights.model_copy(update=changes)
    kind = infer_module_format(torch.nn.Linear, scheme)
    settings = {
        "quant_method": "compressed-tensors",
        "format": kind.value,
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "dequantize": True,  # for transformers; whoever compresses leaves it out
    }
    compressor = BaseCompressor.get_value_from_registry(kind.value)

    def pack(name, value):
        made = compressor.compress(scaled_state(value, scheme.weights), scheme)
        return {name.removesuffix("weight") + key: part for key, part in made.items()}

    return settings, pack


def scaled_state(value, args):
    """A matrix with the scales and zero points that compressed-tensors finds for it."""
    from compressed_tensors.quantization.utils.helpers import calculate_qparams, generate_gparam

    value = value.bfloat16()
    state = {"weight": value}
    if args.strategy == "block":
        groups = blocks_of(value, *args.block_structure).transpose(1, 2).flatten(2)
    elif args.group_size:
        groups = value.unflatten(-1, (-1, args.group_size))
    else:
        groups = value.unsqueeze(1) if args.strategy == "channel" else value.flatten()[None]
    if args.strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(value.min(), value.max())
    scale, zero = calculate_qparams(
        groups.amin(-1), groups.amax(-1), args, state.get("weight_global_scale")
    )
    state["weight_scale"] = scale if args.strategy == "tensor_group" else scale.to(value.dtype)
    return state | {"weight_zero_point": zero}


def in_words(codes, bits):
    """Codes of the last dimension, one after the other, as words of 32 bits."""
    flat = codes.reshape(-1, codes.shape[-1]).tolist()
    rows = []
    for row in flat:
        number = sum(code << (bits * place) for place, code in enumerate(row))
        rows.append([number >> start & 0xFFFFFFFF for start in range(0, bits * len(row), 32)])
    words = torch.tensor(rows, dtype=torch.int64)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def grouped_codes(value, bits, size, order=None):
    """Codes [inputs, outputs], zeros and scales [groups, outputs], and the group of each input."""
    turned, largest = value.t(), (1 << bits) - 1
    inputs = torch.arange(len(turned))
    groups = (inputs if order is None else order.argsort()) // size
    parts = [turned[groups == group] for group in range(len(turned) // size)]
    low = torch.stack([part.amin(0).clamp(max=0) for part in parts])
    high = torch.stack([part.amax(0).clamp(min=0) for part in parts])
    scales = ((high - low) / largest).half()
    zeros = (-low / scales).round().clamp(1, largest).int()
    codes = (turned / scales[groups]).round().int() + zeros[groups]
    return codes.clamp(0, largest), zeros, scales, groups


def gptq(bits, size, act_order=False, first_version=True):
    """Packer of GPTQ; and what it stands for, in float16, under "expected"."""

    def pack(name, value):
        order = torch.randperm(value.shape[1]) if act_order else None
        codes, zeros, scales, groups = grouped_codes(value, bits, size, order)
        stem = name.removesuffix("weight")
        return {
            f"{stem}qweight": in_words(codes.t(), bits).t(),
            f"{stem}qzeros": in_words(zeros - int(first_version), bits),
            f"{stem}scales": scales,
            f"{stem}g_idx": groups.int(),
            f"{stem}expected": (scales[groups] * (codes - zeros[groups])).t(),
        }

    return pack


def in_order_of_activation(name, value, size=8):
    """Packer of compressed-tensors' 4 bits whose groups are of inputs that are not side by side."""
    codes, _, scales, groups = grouped_codes(value, 4, size, torch.randperm(value.shape[1]))
    return {
        f"{name}_packed": in_words(codes.t(), 4),
        f"{name}_scale": scales.t(),
        f"{name}_shape": torch.tensor(value.shape),
        f"{name}_g_idx": groups.int(),
        f"{name.removesuffix('weight')}expected": (scales[groups] * (codes - 8)).t(),
    }


def awq(name, value, size=8):
    """Packer of AWQ: eight outputs a word, even ones first."""
    codes, zeros, scales, groups = grouped_codes(value, 4, size)
    stem = name.removesuffix("weight")
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    packed = [
        in_words(part.unflatten(1, (-1, 8))[..., order].flatten(1), 4) for part in (codes, zeros)
    ]
    return {
        f"{stem}qweight": packed[0],
        f"{stem}qzeros": packed[1],
        f"{stem}scales": scales,
        f"{stem}expected": (scales[groups] * (codes - zeros[groups])).t(),
    }


def modelopt_nvfp4(name, value):
    """Packer of ModelOpt's NVFP4."""
    groups = value.unflatten(1, (-1, 16))
    whole = value.abs().max() / (6 * LARGEST_E4M3)
    scales = (groups.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    product = scales.float() * whole
    codes = nearest_e2m1((groups / product[..., None]).clamp(-6, 6))
    values = E2M1[codes.int() & 7] * torch.where(codes > 7, -1, 1) * product[..., None]
    codes = codes.flatten(1)
    return {
        name: codes[:, ::2] | codes[:, 1::2] << 4,
        f"{name}_scale": scales,
        f"{name}_scale_2": whole,
        f"{name.removesuffix('weight')}expected": values.flatten(1),
    }


def fp8_rows(name, value, rows=True):
    """Packer of FP8 by row, or of one scale, as fbgemm and ModelOpt have them."""
    largest = value.abs().amax(1, keepdim=True) if rows else value.abs().max()
    scales = largest / LARGEST_E4M3
    codes = (value / scales).to(torch.float8_e4m3fn)
    expected = codes.float() * scales
    return {
        name: codes,
        f"{name}_scale": scales,
        f"{name.removesuffix('weight')}expected": expected,
    }
