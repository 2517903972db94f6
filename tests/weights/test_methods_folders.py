"""Published folders of other methods: what each says, golden tokens through convert, refusals."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_mini_jax import cli
from llava_mini_jax.config import Bundle
from llava_mini_jax.data.text.conversation import Turn, encode
from llava_mini_jax.data.text.templates import TEMPLATES
from llava_mini_jax.data.text.tokenizer import load_tokenizer
from llava_mini_jax.errors import InputError
from llava_mini_jax.models import compressors, llama, llava_mini
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.models.seen import Seen
from llava_mini_jax.reproduce import verify_inside
from llava_mini_jax.reproduce.compressor_cases import pictures, tower
from llava_mini_jax.tensorfiles.save_torch import save_torch
from llava_mini_jax.weights import folders, import_hf, methods
from llava_mini_jax.weights.method_folders import PUBLISHED
from tests import published, tiny

fast_compilation = tiny.fast_compilation
ATOL = 2e-4  # the golden cases' own

MQT = dict(query_abstractor_type="matry_query", num_visual_tokens="second_stage")
TOWER = published.vision(image_size=16, patch_size=2)
CLIP_24 = dict(layers=24, width=16, mlp_width=16, heads=2, patch_size=2)


def opened(folder: Path, asked: str | None = None) -> tuple[Bundle, list]:
    given = None if asked is None else methods.parse_asked(asked)
    return folders.open_model(folder, compressor=given, compute_dtype="float32")


def converted(folder: Path, *options: str) -> tuple[Bundle, LlavaMini]:
    """The model of a folder that `convert` has written of this one."""
    target = folder.parent / "converted"
    assert cli.main(["convert", str(folder), str(target), *options]) == 0
    bundle, found = opened(target)
    return bundle, import_hf.load_params(bundle, found, dtype="float32", unrolled=True)


# ------------------------------------------------------------------ folders as they are published


def mqt(place: Path, **fields: Any) -> Path:
    llm = published.language(width=48, head_width=12)
    tensors = published.plain(llm, TOWER)
    tensors = {n: a for n, a in tensors.items() if "mm_projector" not in n}
    tensors |= published.weights("mqt_keep3_of16", "model.query_abstractor.")
    return published.write(place, tensors, llm, TOWER, **MQT | fields)


def token_packer(place: Path, **fields: Any) -> Path:
    vision = tower(published.case("tokenpacker_tower24_scale2").config["clip"])
    llm = published.language(width=24, head_width=6)
    tensors = published.plain(llm, vision)
    tensors = {n: a for n, a in tensors.items() if "mm_projector" not in n}
    tensors |= of_tower("tokenpacker_tower24_scale2")
    fields = dict(model_type="llava", scale_factor=2) | fields
    return published.write(place, tensors, llm, vision, **fields)


def of_tower(case: str) -> dict[str, np.ndarray]:
    """A case's weights, its tower where LLaVA's checkpoints have theirs."""
    found = published.weights(case, "")
    return {
        (f"model.vision_tower.{n}" if n.startswith("vision_tower.") else f"model.{n}"): array
        for n, array in found.items()
    }


def llava(place: Path, case: str | None = None, **fields: Any) -> Path:
    """LLaVA-1.5, with the tower of a case of training-free methods."""
    vision = TOWER if case is None else tower(published.case(case).config["clip"])
    llm = published.language(layers=2)  # so that FastV has one behind its own
    tensors = published.plain(llm, vision)
    tensors |= {} if case is None else of_tower(case)
    return published.write(place, tensors, llm, vision, **fields)


def voco(place: Path) -> Path:
    said = published.case("voco_greedy").config
    sizes = said["llm"]
    llm = dataclasses.replace(
        tiny.LLM,
        vocab_size=sizes["vocab_size"],
        width=sizes["hidden_size"],
        mlp_width=sizes["intermediate_size"],
        layers=sizes["layers"],
        kv_heads=sizes["kv_heads"],
    )
    vision = published.vision(width=said["tower_width"])
    tensors = published.plain(llm, vision) | published.weights("voco_greedy", "")
    return published.write(
        place, tensors, llm, vision, voco=said["voco_id"], tokenizer_padding_side="left"
    )


# ------------------------------------------------------------------------- golden tokens by convert


def test_mqts_golden_tokens(tmp_path: Path) -> None:
    bundle, params = converted(mqt(tmp_path), "--compressor", "mqt,heads=4,count=3")
    case, own = published.case("mqt_keep3_of16"), bundle.model.compressor
    assert (own.queries, own.count, own.norm_eps) == (16, 3, 1e-6) and params.projector is None
    seen = Seen(jnp.asarray(case.inputs["patches"]))
    made = jax.jit(lambda seen: compressors.apply(params.compressor, seen, own))(seen)
    np.testing.assert_allclose(made.tokens_IQE, case.outputs["tokens"], atol=ATOL)


def test_token_packers_golden_tokens_of_pictures(tmp_path: Path) -> None:
    bundle, params = converted(token_packer(tmp_path), "--compressor", "token_packer,heads=2")
    case, own = published.case("tokenpacker_tower24_scale2"), bundle.model.compressor
    assert own.levels == (12, 16, 22, 23) and own.scale == 2
    np.testing.assert_allclose(tokens(params, case, bundle), case.outputs["tokens"], atol=ATOL)


def tokens(params: LlavaMini, case: Any, bundle: Bundle) -> np.ndarray:
    """What the compressor makes of a case's images; in front of a projector, if there is one."""
    cfg = bundle.model

    def see(params: LlavaMini, pixels: jax.Array) -> compressors.Compressed:
        seen = llava_mini.encode_vision(params, pixels[:, None], cfg)
        seen = jax.tree.map(lambda x: x[:, 0], seen)
        return compressors.apply(params.compressor, seen, cfg.compressor)

    made = jax.jit(see)(params, pictures(case))
    if made.valid_IQ is not None:
        return np.asarray(made.tokens_IQE)[:, : int(made.valid_IQ[0].sum())]
    return np.asarray(made.tokens_IQE)


@pytest.mark.parametrize(
    "case, asked",
    [
        ("visionzip_9_4_batch", "visionzip,dominant=9,contextual=4"),
        ("prumerge_plus_tower24", "prumerge_plus,variant=release"),
    ],
)
def test_methods_without_training_on_a_llava(case: str, asked: str, tmp_path: Path) -> None:
    bundle, params = converted(llava(tmp_path, case), "--compressor", asked)
    golden = published.case(case)
    np.testing.assert_allclose(tokens(params, golden, bundle), golden.outputs["tokens"], atol=ATOL)
    assert params.projector is not None


@pytest.mark.slow
def test_vocos_golden_answer(tmp_path: Path) -> None:
    folder = voco(tmp_path)
    bundle, params = converted(folder)
    own, case = bundle.model.compressor, published.case("voco_greedy")
    assert (own.token_id, own.count, own.between, own.variant) == (60, 2, (13,), "release")
    assert bundle.prompt.template == "voco_v1" and bundle.prompt.padding_side == "left"
    found = verify_inside._greedy(tiny.on_device(params), case, bundle.model)
    np.testing.assert_array_equal(found["generated_ids"], case.outputs["generated_ids"])
    np.testing.assert_allclose(found["step_logits"], case.outputs["step_logits"], atol=ATOL)


def test_vocos_prompt_begins_with_the_picture(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(voco(tmp_path))
    turns = [Turn("user", "<image>\nis\nit?"), Turn("assistant", None)]
    ids = encode(TEMPLATES["voco_v1"], turns, tokenizer, double_bos=False).ids.tolist()
    # Behind the image's mark stands what the compressor does not write.
    assert ids[:3] == [1, -200, 13] and 13 not in ids[3:] and -200 not in ids[2:]
    with pytest.raises(InputError, match="2 images are given, but this template takes one"):
        encode(TEMPLATES["voco_v1"], [Turn("user", "<image><image>"), turns[1]], tokenizer,
               double_bos=False)  # fmt: skip


def test_fastvs_golden_logits(tmp_path: Path) -> None:
    case = published.case("fastv_k2_half_mask")
    llm = dataclasses.replace(
        tiny.LLM, vocab_size=40, layers=case.config["llm"]["layers"], kv_heads=4
    )
    tensors = published.plain(llm, tiny.VISION) | published.weights(case.folder.name, "")
    folder = published.write(tmp_path, tensors, llm, tiny.VISION)
    bundle, params = converted(folder, "--compressor", "fastv")
    own = bundle.model.compressor
    assert (own.layer, own.keep, own.variant) == (2, 8, "mask")
    x_BSD = jnp.asarray(case.inputs["inputs_embeds"])
    place_BS = jnp.arange(x_BSD.shape[1])[None] - case.config["before_image"]
    placed = compressors.Placed(
        valid_BS=jnp.ones(x_BSD.shape[:2], bool),
        visual_BS=(place_BS >= 0) & (place_BS < 16),
        place_BS=place_BS,
        patches=16,
    )
    how = compressors.How(bundle.model.llm, "none", "auto")
    hidden = compressors.run(None, tiny.on_device(params.llm), x_BSD, placed, own, how)
    hidden = llava_mini.rms_norm(hidden, params.llm.final_norm, bundle.model.llm.norm_eps)
    found = llama.logits(tiny.on_device(params.llm), hidden)
    np.testing.assert_allclose(found, case.outputs["logits"], atol=ATOL)


def test_m3s_counts(tmp_path: Path) -> None:
    folder = llava(tmp_path, matryoshka_vis_token_scale=[1, 4, 64])
    assert opened(folder)[0].model.compressor.count == 64
    bundle, _ = opened(folder, "m3,count=4")
    case = published.case("m3_8x8_batch")
    seen = Seen(jnp.asarray(case.inputs["projected"]))
    made = compressors.apply(None, seen, bundle.model.compressor).tokens_IQE
    np.testing.assert_allclose(made, case.outputs["tokens.4"], atol=ATOL)
    with pytest.raises(InputError, match=r"was trained with 1, 4, 64 tokens; give one of"):
        opened(folder, "m3,count=16")


def test_first_token_packers_do_not_say_their_scale(tmp_path: Path) -> None:
    folder = token_packer(tmp_path, scale_factor=None)
    assert opened(folder, "token_packer,heads=2")[0].model.compressor.scale == 2


def test_a_converted_folder_takes_options_too(tmp_path: Path) -> None:
    folder = mqt(tmp_path)
    converted(folder, "--compressor", "mqt,heads=4")
    again = tmp_path / "converted"
    assert opened(again)[0].model.compressor.count == 16
    assert opened(again, "mqt,count=5")[0].model.compressor.count == 5
    with pytest.raises(InputError, match="was trained with mqt, and not with visionzip"):
        opened(again, "visionzip")


# --------------------------------------------------------------------------------------- refusals


BAD: dict[str, tuple[Callable[..., Path], dict[str, Any], str | None, str]] = {
    "another method's model": (mqt, {}, "visionzip", "was trained with mqt, and not with visionz"),
    "not trained, by field": (
        llava,
        {},
        "m3",
        'not trained with m3 .*"matryoshka_vis_',
    ),
    "not trained, by tensors": (llava, {}, "mqt", r"no tensors \"model.query_abstractor"),
    "not trained, by its token": (llava, {}, "voco", 'it has no token "<voco>"'),
    "a LLaVA-Mini": (
        llava,
        dict(compressor_size=1, model_type="llava_mini_llama"),
        "fastv",
        "was trained with LLaVA-Mini's, and not with fastv",
    ),
    "an unknown method": (llava, {}, "tome", 'the method "tome" is unknown; use one of mqt'),
    "an unknown option": (
        llava,
        {},
        "fastv,rank=3",
        "'rank=3' is not a valid option; .* layer, keep, vari",
    ),
    "an option twice": (llava, {}, "fastv,keep=3,keep=4", "'keep=4' is not a valid option"),
    "no number": (llava, {}, "fastv,keep=many", "--compressor fastv,keep=many: expected int"),
    "a count that there is not": (mqt, {}, "mqt,heads=4,count=17", "mqt has no 17 tokens"),
    "a layer that the LLM has not": (
        llava,
        {},
        "fastv,layer=2,keep=3",
        "acts before layer 2, counted from 0, of an LLM of 2: give an",
    ),
    "more than the tower has": (
        llava,
        {},
        "visionzip,dominant=60,contextual=10",
        r"--compressor visionzip,.*: visionzip has no 60 \+ 10 tokens of 8 x 8 patches",
    ),
    "two methods' fields": (mqt, dict(scale_factor=2), None, "fields of several methods: .*mqt"),
    "a number of tokens": (mqt, dict(num_visual_tokens=0), None, '"num_visual_tokens" is 0'),
    "a stage": (mqt, dict(num_visual_tokens="third"), None, '"num_visual_tokens" is .third'),
    "another abstractor": (mqt, dict(query_abstractor_type="q"), None, '"query_abstractor_ty'),
    "a field of no method": (
        mqt,
        dict(token_reducer="x"),
        None,
        'not known here .*"token_redu',
    ),
    "HD": (token_packer, dict(image_aspect_ratio="slice"), None, "TokenPacker-HD"),
    "scale": (token_packer, dict(scale_factor=4), "token_packer,heads=2", "scale 4 does not div"),
    "scales of M3": (llava, dict(matryoshka_vis_token_scale=["1"]), None, "matryoshka_vis_token"),
    "parts": (llava, dict(resolution_ratio=2), "visionzip", "visionzip is defined on whole im"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_opened_is_one_sentence(name: str, tmp_path: Path) -> None:
    make, fields, asked, message = BAD[name]
    folder = make(tmp_path, **fields)
    with pytest.raises(InputError, match=message) as caught:
        opened(folder, asked)
    assert "\n" not in str(caught.value)


def loads(folder: Path, asked: str | None = None) -> LlavaMini:
    bundle, found = opened(folder, asked)
    return import_hf.load_params(bundle, found, dtype="float32", unrolled=True)


@pytest.mark.parametrize(
    "make, prefix", [(mqt, "query_abstractor"), (token_packer, "mm_projector")]
)
def test_tensors_that_do_not_fit_are_told_by_name(
    make: Callable[..., Path], prefix: str, tmp_path: Path
) -> None:
    folder = make(tmp_path)
    file, asked = (
        folder / "model.safetensors",
        f"{'mqt' if make is mqt else 'token_packer'},heads=2",
    )
    whole = load_file(file)
    own = sorted(name for name in whole if prefix in name)
    save_file({n: a for n, a in whole.items() if n != own[0]}, file)
    with pytest.raises(InputError, match=f"missing for compressor/.*{own[0]}"):
        loads(folder, asked)
    save_file(whole | {own[1]: whole[own[1]][:-1].copy()}, file)
    with pytest.raises(InputError, match=f"wrong shape: {own[1]}"):
        loads(folder, asked)
    save_file(whole | {f"model.{prefix}.more": whole[own[2]]}, file)
    with pytest.raises(InputError, match=rf"unexpected in .*: model\.{prefix}\.more"):
        loads(folder, asked)


@pytest.mark.parametrize("make", [mqt, token_packer, llava, voco])
def test_damaged_files_are_one_sentence(make: Callable[..., Path], tmp_path: Path) -> None:
    """Cut anywhere, and with any field of the method's of another type."""
    folder, rng = make(tmp_path), np.random.default_rng(0)
    weights, text = folder / "model.safetensors", folder / "config.json"
    whole, said = weights.read_bytes(), text.read_text()
    for cut in (0, 7, 100, *rng.integers(8, len(whole), 6)):
        weights.write_bytes(whole[:cut])
        with pytest.raises(InputError):
            opened(folder)
    weights.write_bytes(whole)
    own = [name for m in PUBLISHED.values() for name in m.fields]
    for name in own:
        for value in (-1, 2.5, "many", [], [0], {}, True, "second_stage", [[1]]):
            text.write_text(json.dumps(json.loads(said) | {name: value}))
            try:
                loads(folder)
            except InputError as error:
                assert name in str(error) or "do not match" in str(error) or "heads" in str(error)
            else:
                assert (name, value) in [("num_visual_tokens", "second_stage")]


def test_prumerges_adapters_are_merged(tmp_path: Path) -> None:
    """LLaVA's form, on a language model: its projector lies beside the adapters."""
    base = llava(tmp_path, "prumerge_plus_tower24")
    whole = load_file(base / "model.safetensors")
    folder = tmp_path / "adapter"
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    own = {n: a for n, a in whole.items() if "mm_projector" in n}
    save_file({n: a for n, a in whole.items() if n not in own}, base / "model.safetensors")
    save_torch(
        folder / "non_lora_trainables.bin", {f"base_model.model.{n}": 2 * a for n, a in own.items()}
    )
    name = "model.layers.0.mlp.up_proj"
    out, into = whole[f"{name}.weight"].shape
    pair = {f"base_model.model.{name}.lora_A.weight": np.ones((2, into), np.float32)}
    pair[f"base_model.model.{name}.lora_B.weight"] = np.ones((out, 2), np.float32)
    save_torch(folder / "adapter_model.bin", pair)
    said = dict(peft_type="LORA", r=2, lora_alpha=4, base_model_name_or_path=str(base))
    (folder / "adapter_config.json").write_text(json.dumps(said))
    bundle, params = converted(folder, "--merge", "--compressor", "prumerge_plus")
    golden = published.case("prumerge_plus_tower24")
    found = tokens(params, golden, bundle)
    # One image's own count is that of the released code, but for its last patch.
    np.testing.assert_allclose(found, golden.outputs["tokens"], atol=ATOL)
    added = np.asarray(params.llm.layers[0].up_proj) - whole[f"{name}.weight"]
    np.testing.assert_allclose(added, 4.0, atol=1e-5)
    first = own["model.mm_projector.0.weight"]
    np.testing.assert_allclose(params.projector.fc1.kernel, 2 * first, atol=1e-6)
