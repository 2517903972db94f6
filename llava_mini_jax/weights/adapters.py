"""Folders that hold a change of a model: LoRA as PEFT and LLaVA leave it, merged as it is read.

    adapter_config.json        base_model_name_or_path --> the base's folder; rank, alpha
    adapter_model.safetensors  X.lora_A.weight [rank, in], X.lora_B.weight [out, rank]
    non_lora_trainables.bin    whole tensors that were trained beside them (LLaVA's)
    config.json                LLaVA's and ours; PEFT leaves none: then the base's counts
                  |
    open_adapter --> Adapter --tensors--> {name: LazyTensor}: X = base + alpha / rank * B A, as read

The sum is made in float32 and rounded once, to the dtype that is asked for. What would change the
arithmetic otherwise (DoRA, biases, bases that were changed at the start) is refused by field name.
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llava_mini_jax.errors import InputError, short
from llava_mini_jax.json_fields import Fields, read_json
from llava_mini_jax.tensorfiles.files import open_tensors
from llava_mini_jax.tensorfiles.lazy_tensor import LazyTensor
from llava_mini_jax.weights.hf_fields import words
from llava_mini_jax.weights.hub import resolve_folder

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
WHOLE = "non_lora_trainables.bin"
BASE = "adapter_base.json"  # ours: which numbers the base had
PREFIX = "base_model.model."
Tensors = Mapping[str, LazyTensor]

# Names of one module before and since transformers 4.52, for adapters trained with the other one.
RENAMED = (
    ("model.language_model.", "language_model.model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
)
_PAIR = re.compile(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?")
# Of PEFT's fields those that change no number once the tensors are there.
_HARMLESS = words(
    """
    task_type auto_mapping revision inference_mode lora_dropout target_modules exclude_modules
    modules_to_save layers_to_transform layers_pattern loftq_config eva_config corda_config
    megatron_core qalora_group_size peft_version ensure_weight_tying
    """
)


@dataclass(frozen=True)
class Adapter:
    folder: Path
    base: Path
    _config: Fields

    @property
    def described(self) -> Path:
        """The folder whose config.json says what the model is."""
        return self.folder if (self.folder / "config.json").is_file() else self.base

    def tensors(self) -> dict[str, LazyTensor]:
        """The base's tensors with the changes in them, none of them read yet.

        Raises InputError where names or shapes are not those of this base.
        """
        base = open_tensors(self.base)
        _check_base(self.folder, self.base, base)
        pairs, whole = self._read()
        table = next((name for name in (*pairs, *whole) if "embed_tokens" in name), None)
        if table is not None and not any(name.endswith("lm_head.weight") for name in base):
            raise InputError(
                f"{self.folder} changes {table}, and the head of {self.base} is the same table, "
                "which PEFT leaves as it was: that cannot be read; merge it by PEFT first"
            )
        merged = dict(base)
        own = (self.folder / "config.json").is_file()
        for name, tensor in whole.items():
            # LLaVA's have what the base lacks: a projector, a compressor.
            at = name if own and name not in base else self._find(base, name)
            if at in base and base[at].shape != tensor.shape and not own:
                raise self._other(f"{name} has shape {tensor.shape}, there {base[at].shape}")
            merged[at] = tensor
        for module, factors in pairs.items():
            name = self._find(base, f"{module}.weight")
            merged[name] = self._changed(module, merged[name], factors)
        return merged

    def _read(self) -> tuple[dict[str, dict[str, LazyTensor]], dict[str, LazyTensor]]:
        """(the two factors of each module, whole tensors by name)."""
        file = next((self.folder / n for n in WEIGHTS if (self.folder / n).is_file()), None)
        if file is None:
            raise InputError(f"{self.folder} holds {CONFIG}, but none of {', '.join(WEIGHTS)}: "
                             "download the rest of the adapter")  # fmt: skip
        pairs: dict[str, dict[str, LazyTensor]] = {}
        whole: dict[str, LazyTensor] = {}
        for name, tensor in open_tensors(file).items():
            plain = name.removeprefix(PREFIX)
            if re.search(r"\.lora_(magnitude_vector|.*\.bias)", plain):
                raise InputError(f"{file} holds {name}: DoRA and biases of adapters cannot be read")
            found = _PAIR.fullmatch(plain)
            if found is None:
                whole[re.sub(r"\.(modules_to_save|base_layer)\b", "", plain)] = tensor
            else:
                pairs.setdefault(found[1], {})[(found[2] or "") + found[3]] = tensor
        beside = self.folder / WHOLE
        if beside.is_file():
            whole |= {_llava_name(name): t for name, t in open_tensors(beside).items()}
        return pairs, whole

    def _changed(
        self, module: str, base: LazyTensor, factors: dict[str, LazyTensor]
    ) -> "ChangedTensor":
        embedding = "embedding_A" in factors
        kinds = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        if set(factors) != set(kinds):
            raise InputError(
                f"{self.folder}: of LoRA's two factors of {module} there is {', '.join(factors)} "
                "alone: the file is damaged, so get it again"
            )
        a, b = (factors[kind] for kind in kinds)
        # Of a table PEFT adds the transposed product: A is [rank, vocabulary], B [width, rank].
        out, into = (a.shape[1:], b.shape[:1]) if embedding else (b.shape[:1], a.shape[1:])
        rank = self._rank(module)
        fits = len(a.shape) == len(b.shape) == 2 and (a.shape[0], b.shape[1]) == (rank, rank)
        if not fits or base.shape != (*out, *into):
            raise self._other(
                f"{module} is changed by {b.shape} x {a.shape} of rank {rank}, but its weight has "
                f"shape {base.shape}"
            )
        fields = {name: getattr(base, name) for name in LazyTensor.__dataclass_fields__}
        return ChangedTensor(**fields, a=a, b=b, scale=self._scale(module), embedding=embedding)

    def _rank(self, module: str) -> int:
        return _of_pattern(self._config, "rank_pattern", module, self._config.size("r"))

    def _scale(self, module: str) -> float:
        alpha = _of_pattern(
            self._config, "alpha_pattern", module, self._config.get("lora_alpha", float)
        )
        rank = self._rank(module)
        return alpha / (rank**0.5 if self._config.get("use_rslora", bool, False) else rank)

    def _find(self, base: Tensors, name: str) -> str:
        """The base's name of a tensor; InputError where it has none."""
        names = [name]
        for one, other in RENAMED:
            names += [other + name.removeprefix(one)] if name.startswith(one) else []
            names += [one + name.removeprefix(other)] if name.startswith(other) else []
        for each in names:
            if each in base:
                return each
        raise self._other(f"{name} is not in it")

    def _other(self, why: str) -> InputError:
        return InputError(
            f"{self.folder} is an adapter of another model than {self.base}: {why}; correct "
            f"base_model_name_or_path in its {CONFIG}"
        )


@dataclass(frozen=True)
class ChangedTensor(LazyTensor):
    """A base's tensor that is read with LoRA's change in it."""

    a: LazyTensor
    b: LazyTensor
    scale: float
    embedding: bool  # a table's factors, transposed

    def read(
        self,
        index: tuple[slice, ...] = (),
        empty: Callable[[tuple[int, ...], np.dtype], np.ndarray] = np.empty,
    ) -> np.ndarray:
        total = super().read(index, lambda shape, _: np.empty(shape, np.float32))
        rows, columns = (
            slice(*each.indices(size))
            for each, size in zip((*index, slice(None), slice(None))[:2], self.shape, strict=True)
        )
        if self.embedding:
            out, into = self.a.read((slice(None), rows)).T, self.b.read((columns,)).T
        else:
            out, into = self.b.read((rows,)), self.a.read((slice(None), columns))
        total += self.scale * (out.astype(np.float32) @ into.astype(np.float32))
        array = empty(total.shape, self.dtype)
        array[...] = total
        return array


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def open_adapter(folder: Path, base: Path | None = None) -> Adapter:
    """An adapter's folder and its base: `base`, or what its adapter_config.json names.

    A name is looked for as it stands, from the adapter's folder on, beside it, and on the hub.
    """
    where = folder / CONFIG
    f = Fields(read_json(where), str(where))
    _refuse_others(f)
    found = base or find_base(folder, f.get("base_model_name_or_path", str))
    if is_adapter(found):
        raise InputError(f"{folder} is an adapter of {found}, which is an adapter itself: merge "
                         f"that first (llava-mini convert {found} DST --merge)")  # fmt: skip
    return Adapter(folder, found, f)


def described(folder: Path, base: Path | None = None) -> Path:
    """The folder with a model's config.json: of an adapter without one, its base's."""
    return open_adapter(folder, base).described if is_adapter(folder) else folder


def tokenizer_folder(folder: Path, base: Path | None = None) -> Path:
    """Where a model's tokenizer lies: an adapter may have left it with its base."""
    has = any(path.name.startswith(("tokenizer", "vocab.json")) for path in folder.iterdir())
    return folder if has or not is_adapter(folder) else open_adapter(folder, base).base


def digest(tensors: Tensors) -> str:
    """SHA-256 of names, shapes, dtypes and some numbers of all tensors: it knows a model again."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.shape} {tensor.dtype}\n".encode())
        found.update(tensor.read(tuple(slice(0, 64) for _ in tensor.shape)).tobytes())
    return found.hexdigest()


def _check_base(folder: Path, path: Path, base: Tensors) -> None:
    """InputError where an adapter says which numbers its base had, and these are others."""
    if not (folder / BASE).is_file():
        return
    said = Fields(read_json(folder / BASE), str(folder / BASE)).get("sha256", str)
    if said != digest(base):
        raise InputError(
            f"{folder} is an adapter of another model than {path}: its tensors are not those that "
            f"{BASE} was written for; name the right base in {CONFIG}, or remove {BASE}"
        )


def find_base(folder: Path, name: str) -> Path:
    """The folder of an adapter's base; InputError where it is nowhere."""
    for path in (Path(name), (folder / name).resolve(), folder.parent / Path(name).name):
        if path.is_dir() and path.resolve() != folder.resolve():
            return path
    try:
        return resolve_folder(name)
    except InputError as error:
        raise InputError(
            f"{folder} is an adapter of {short(name)}, which cannot be found ({error}); put that "
            f"model's folder next to it, or give its path as base_model_name_or_path in {CONFIG}"
        ) from None


def _refuse_others(f: Fields) -> None:
    f.only("peft_type", "LORA", because="it is another kind of adapter")
    because = "the base's own weights were changed at the start"
    f.only("init_lora_weights", True, False, "gaussian", "orthogonal", "eva", because=because)
    f.only("fan_in_fan_out", False, because="weights are transposed")
    f.only("bias", "none", because="biases were trained")
    for name in ("use_dora", "lora_bias", "use_qalora", "use_bdlora"):
        f.only(name, False, because="the change is another one")
    for name in (
        *("layer_replication", "alora_invocation_tokens", "target_parameters", "arrow_config"),
        *("trainable_token_indices", "megatron_config"),
    ):
        f.only(name, because="the change is another one")
    f.get("base_model_name_or_path", str, "")
    f.size("r")
    f.get("lora_alpha", float)
    f.get("use_rslora", bool, False)
    for name in ("rank_pattern", "alpha_pattern"):
        f.get(name, dict, {})
    f.finish(_HARMLESS)


def _of_pattern(f: Fields, name: str, module: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of a module's name."""
    for pattern, value in f.get(name, dict, {}).items():
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error:
            raise f.wrong(name, "patterns of module names") from None
        if matched:
            if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
                raise f.wrong(name, "numbers above 0")
            return value
    return default


def _llava_name(name: str) -> str:
    """LLaVA keeps PEFT's prefix in non_lora_trainables.bin."""
    return (
        name.removeprefix(PREFIX) if name.startswith(PREFIX) else name.removeprefix("base_model.")
    )
