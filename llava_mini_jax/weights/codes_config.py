"""What a folder says of its 4-bit codes: config.json's quantization_config, of AWQ or GPTQ.

    {"quant_method": "awq", "bits": 4, ...} --coding_of--> Coding --> codes.py, which reads them

A field is read, known to be harmless (how codes were found, which kernel runs them), or refused by
name. The lists are of what AutoAWQ, AutoGPTQ, GPTQModel and transformers up to 5.24 write.
"""

import dataclasses
from pathlib import Path

from llava_mini_jax.errors import InputError
from llava_mini_jax.json_fields import Fields, read_json
from llava_mini_jax.weights.hf_fields import words

METHODS = ("awq", "gptq")
FIELD = "quantization_config"
# Of older tools, beside config.json, with the same settings once more.
BESIDE = ("quantize_config.json", "quant_config.json")
# How codes were found and which kernel may run them, but not what they mean.
_HARMLESS = words(
    """
    sym true_sequential static_groups damp_percent damp_auto_increment mse act_group_aware dataset
    tokenizer batch_size pad_token_id model_seqlen max_input_length block_name_to_quantize
    module_name_preceding_first_block modules_in_block_to_quantize cache_block_outputs meta lm_head
    do_fuse modules_to_fuse fuse_max_seq_len exllama_config use_exllama disable_exllama
    use_cuda_fp16 model_name_or_path model_file_base_name
    """
)
_AWQ_KERNELS = words(
    "autoawq auto auto_trainable machete marlin exllama_v1 exllama_v2 gemm gemm_triton torch_awq"
    " torch_fused_awq"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coding:
    """How a folder's codes lie, by its config.json."""

    method: str  # "awq" or "gptq"
    group: int | None  # inputs with one scale; None: all of them
    zero_offset: int  # what is added to a stored zero
    reordered: bool  # whether inputs may be in any group, as X.g_idx says
    plain: tuple[str, ...]  # parts of the names of modules that have no codes
    where: str


def coding_of(config: Fields, folder: Path) -> Coding | None:
    """What a folder's config.json says of its codes; None where it has none.

    Raises InputError, by name, for bits and fields that are not known here.
    """
    found = config.object(FIELD)
    if found is None:
        return None
    f = Fields(found, f"{config.where}: {FIELD}")
    method = f.get("quant_method", str)
    f.size("bits")
    f.only("bits", 4, because="its codes have another size")
    offset = _zero_offset(f) if method == "gptq" else _check_awq(f)
    group = f.get("group_size", int, 128)
    if group != -1 and (not 2 <= group < 2**31 or group % 2):
        raise f.wrong("group_size", "an even number from 2 on, or -1")
    plain = f.get("modules_to_not_convert", list, []) or []
    if not all(isinstance(name, str) and name for name in plain):
        raise f.wrong("modules_to_not_convert", "names of modules")
    coding = Coding(
        method=method,
        group=None if group == -1 else group,
        zero_offset=offset,
        reordered=f.get("desc_act", bool, False),
        plain=tuple(plain),
        where=f.where,
    )
    f.finish(_HARMLESS)
    _check_beside(folder, coding)
    return coding


def _check_awq(f: Fields) -> int:
    for name in ("version", "format"):
        f.only(name, "gemm", "GEMM", because="its codes are in another order")
    f.only("checkpoint_format", "gemm", because="its codes are in another order")
    f.only("backend", *_AWQ_KERNELS, because="its codes are in another order")
    f.only("zero_point", True, because="its codes have no zeros of their own")
    f.only("desc_act", False, because="inputs are in another order")
    return 0


def _zero_offset(f: Fields) -> int:
    """Format "gptq" stores zeros less 1."""
    because = "its codes are in another order"
    for name in ("checkpoint_format", "format"):
        f.only(name, "gptq", "gptq_v2", because=because)
    f.only("is_marlin_format", False, because=because)
    f.only("pack_dtype", "int32", because=because)
    f.only("dynamic", {}, because="some modules are quantized in another way")
    f.get("backend", str, None)  # a kernel
    said = {f.values.get(name) for name in ("checkpoint_format", "format")} - {None}
    if len(said) > 1:
        raise f.wrong("format", 'what "checkpoint_format" says')
    return 0 if said == {"gptq_v2"} else 1


def _check_beside(folder: Path, coding: Coding) -> None:
    """InputError where an older tool's file beside config.json says something else of the codes."""
    for name in BESIDE:
        if not (folder / name).is_file():
            continue
        said = read_json(folder / name)
        group = said.get("group_size", said.get("q_group_size"))
        wanted = {"bits": 4, "w_bit": 4, "desc_act": coding.reordered}
        if coding.method == "gptq":
            wanted["checkpoint_format"] = "gptq" if coding.zero_offset else "gptq_v2"
        differ = [key for key, value in wanted.items() if said.get(key, value) != value]
        if group not in (None, coding.group or -1):
            differ.append("group_size")
        if differ:
            raise InputError(
                f"{folder / name} says another {differ[0]} than {coding.where}: the folder was put"
                " together of two models; remove the file that does not belong to it"
            )
