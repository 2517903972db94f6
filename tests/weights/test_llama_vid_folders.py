"""LLaMA-VID's folders: fields, its EVA tower, BERT's tokenizer beside it, and what is refused."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llava_mini_jax import cli
from llava_mini_jax.config import Bundle
from llava_mini_jax.data.digits.pages import build_tokenizer
from llava_mini_jax.data.text import question_ids
from llava_mini_jax.errors import InputError
from llava_mini_jax.inference.opening import open_folder
from llava_mini_jax.models import clip, compressors
from llava_mini_jax.models.llava_mini import LlavaMini
from llava_mini_jax.models.seen import Reads, Seen
from llava_mini_jax.weights import eva, folders, import_hf, methods
from tests import published, tiny

fast_compilation = tiny.fast_compilation
ATOL = 2e-4

FIELDS = dict(
    model_type="llava",
    architectures=["LlavaLlamaAttForCausalLM"],
    bert_type="qformer_pretrain",
    num_query=4,
    compress_type="mean",
    image_processor="./llamavid/processor/clip-patch14-224",
    max_token=2048,
)
HEADS = "llama_vid,qformer_heads=2"
LLM = published.language(width=48, head_width=12)


def llama_vid(place: Path, case: str | None = "llamavid_mean_multiturn", **fields: Any) -> Path:
    """Around a case's weights, behind a CLIP of its width; without a case behind an EVA's."""
    if case is not None:
        tower = published.vision(image_size=16, patch_size=4)
        own = published.weights(case, "model.")
    else:
        tower = published.vision(
            width=88, heads=1, layers=2, pre_norm=False, patch_bias=True, select_layer=-1,
            activation="gelu", norm_eps=1e-6,
        )  # fmt: skip
        own = of_width(published.weights("llamavid_mean_multiturn", "model."), 88)
    tensors = {n: a for n, a in published.plain(LLM, tower).items() if "mm_projector" not in n}
    published.bert(place)
    tensors |= own
    if case is None:
        fields = dict(mm_vision_tower="./model_zoo/LAVIS/eva_vit_g.pth") | fields
        tensors = published.eva(tensors)
    return published.write(place, tensors, LLM, tower, **FIELDS | fields)


def of_width(tensors: dict[str, np.ndarray], width: int) -> dict[str, np.ndarray]:
    """What reads or gives the tower's 32 numbers, for another width; a projection in front."""
    rng, found = np.random.default_rng(0), dict(tensors)
    for name in tensors:
        part = name.removeprefix("model.").rsplit(".", 1)
        if part[0] in ("vlm_att_projector", "vlm_att_key_projector"):
            shape = (width, *tensors[name].shape[1:])
            if part[0] == "vlm_att_key_projector" and part[1] == "weight":
                shape = (width, width)
            found[name] = rng.standard_normal(shape).astype(np.float32) / 6
        elif part in (["vlm_att_val_projector", "weight"], ["mm_projector.0", "weight"]):
            shape = (tensors[name].shape[0], width)
            found[name] = rng.standard_normal(shape).astype(np.float32) / 6
    found["model.vlm_att_bert_proj.weight"] = rng.standard_normal((32, width)).astype(np.float32)
    found["model.vlm_att_bert_proj.bias"] = np.zeros(32, np.float32)
    return found


def opened(folder: Path, asked: str = HEADS) -> tuple[Bundle, list]:
    return folders.open_model(
        folder, compressor=methods.parse_asked(asked), compute_dtype="float32"
    )


def converted(folder: Path, *more: str) -> tuple[Bundle, LlavaMini]:
    target = folder.parent / "converted"
    options = ["--compressor", ",".join([HEADS, *more])]
    assert cli.main(["convert", str(folder), str(target), *options]) == 0
    bundle, found = folders.open_model(target, compute_dtype="float32")
    return bundle, import_hf.load_params(bundle, found, dtype="float32", unrolled=True)


@pytest.mark.slow  # compiles for a quarter of a minute
def test_golden_tokens_by_convert(tmp_path: Path) -> None:
    # The case's features have a class token, as an EVA's do.
    bundle, params = converted(llama_vid(tmp_path), "class_token=true")
    case, own = published.case("llamavid_mean_multiturn"), bundle.model.compressor
    assert (own.content, own.qformer_layers, own.qformer_queries) == (1, 2, 4)
    for number in range(3):
        ids, mask = (case.inputs[f"prompt_{name}.{number}"] for name in ("ids", "mask"))
        features = np.tile(case.inputs["features"][number], (len(ids), 1, 1))
        seen = Seen(
            jnp.asarray(features[:, 1:]),
            class_IE=jnp.asarray(features[:, 0]),
            question_IT=jnp.asarray(np.where(mask > 0, ids, -1), jnp.int32),
        )
        made = jax.jit(lambda seen: compressors.apply(params.compressor, seen, own))(seen)
        np.testing.assert_allclose(made.tokens_IQE, case.outputs[f"tokens.{number}"], atol=ATOL)
    assert (tmp_path / "converted" / "bert-base-uncased" / "tokenizer.json").is_file()


def test_its_tower_is_an_eva(tmp_path: Path) -> None:
    folder = llama_vid(tmp_path, None)
    bundle, found = opened(folder)
    vision, own = bundle.model.vision, bundle.model.compressor
    assert (vision.layers, vision.used_layers, vision.heads, vision.image_size) == (2, 2, 1, 16)
    assert own.class_token and own.qformer_cross_width == 32 and own.width == 88
    params = import_hf.load_params(bundle, found, dtype="float32", unrolled=True)
    pixels = np.random.default_rng(0).standard_normal((2, 16, 16, 3)).astype(np.float32)
    seen = clip.look(params.vision, jnp.asarray(pixels), vision, jnp.float32,
                     Reads(class_token=True))  # fmt: skip
    expected = eva_forward(load_file(folder / "model.safetensors"), pixels)
    np.testing.assert_allclose(seen.class_IE, expected[:, 0], atol=ATOL)
    np.testing.assert_allclose(seen.patches_IPE, expected[:, 1:], atol=ATOL)


def eva_forward(tensors: dict[str, np.ndarray], pixels: np.ndarray) -> np.ndarray:
    """What its code computes, in numpy: [I, 1 + P, E] behind the last block."""
    w = {n.removeprefix(eva.PREFIX): a.astype(np.float64) for n, a in tensors.items()}

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    images, side = len(pixels), 4
    cells = pixels.reshape(images, 4, side, 4, side, 3).transpose(0, 1, 3, 5, 2, 4)
    kernel = w["patch_embed.proj.weight"]
    x = cells.reshape(images, 16, -1) @ kernel.reshape(len(kernel), -1).T
    x += w["patch_embed.proj.bias"]
    x = np.concatenate([np.tile(w["cls_token"], (images, 1, 1)), x], axis=1) + w["pos_embed"]
    for n in range(2):
        y = norm(x, f"blocks.{n}.norm1") @ w[f"blocks.{n}.attn.qkv.weight"].T
        q, k, v = np.split(y, 3, axis=-1)
        q, v = q + w[f"blocks.{n}.attn.q_bias"], v + w[f"blocks.{n}.attn.v_bias"]
        scores = q @ k.swapaxes(1, 2) / np.sqrt(q.shape[-1])
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = shares / shares.sum(-1, keepdims=True) @ v
        x = x + mixed @ w[f"blocks.{n}.attn.proj.weight"].T + w[f"blocks.{n}.attn.proj.bias"]
        y = norm(x, f"blocks.{n}.norm2") @ w[f"blocks.{n}.mlp.fc1.weight"].T
        y = np.asarray(jax.nn.gelu(y + w[f"blocks.{n}.mlp.fc1.bias"], approximate=False))
        x = x + y @ w[f"blocks.{n}.mlp.fc2.weight"].T + w[f"blocks.{n}.mlp.fc2.bias"]
    return x


def test_a_converted_eva_is_the_same(tmp_path: Path) -> None:
    folder = llama_vid(tmp_path, None)
    bundle, found = opened(folder)
    before = import_hf.load_params(bundle, found, dtype="float32", unrolled=True)
    again, after = converted(folder)
    assert again.model == bundle.model and again.images == bundle.images
    jax.tree.map(np.testing.assert_array_equal, before, after)


def test_content_tokens_by_field(tmp_path: Path) -> None:
    folder = llama_vid(tmp_path, compress_type="grid:2")
    assert opened(folder)[0].model.compressor.content == 2
    text = folder / "config.json"
    said = json.loads(text.read_text())
    text.write_text(json.dumps(said | dict(compress_type=None)))
    own = opened(folder)[0].model.compressor
    assert own.content == 4 and not own.class_token  # a CLIP's "patch" features


BAD = {
    "another reader": (dict(bert_type="raw_bert_layer:6"), '"bert_type" is .raw_bert_layer:6'),
    "pooling": (dict(compress_type="max"), '"compress_type" is .max., expected "mean"'),
    "a grid of one": (dict(compress_type="grid:1"), '"compress_type" is .grid:1'),
    "a grid that does not divide": (dict(compress_type="grid:3"), "no 3 x 3 content tokens of 4"),
    "queries": (dict(num_query="32"), "\"num_query\" is '32', expected a whole number"),
    "a field of another method": (dict(num_visual_tokens=3), "fields of several methods"),
    "the class token as a patch": (
        dict(mm_vision_select_feature="cls_patch"),
        'vision feature "cls_patch"',
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_fields_that_cannot_be_used(name: str, tmp_path: Path) -> None:
    fields, message = BAD[name]
    with pytest.raises(InputError, match=message) as caught:
        opened(llama_vid(tmp_path, **fields))
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit(tmp_path: Path) -> None:
    folder = llama_vid(tmp_path)
    file = folder / "model.safetensors"
    whole = load_file(file)

    def loads() -> None:
        bundle, found = opened(folder)
        import_hf.make_plan(import_hf.llava_mini.spec(bundle.model), bundle.model, found)

    loads()
    for name in ("model.vlm_att_query", "model.vlm_att_ln.bias", "model.mm_projector.2.weight"):
        save_file({n: a for n, a in whole.items() if n != name}, file)
        with pytest.raises(InputError, match=f"missing for compressor/.*{name}"):
            loads()
        save_file(whole | {name: whole[name][:, :1].copy() if whole[name].ndim > 1
                           else whole[name][:1]}, file)  # fmt: skip
        with pytest.raises(InputError, match=f"wrong shape: {name}"):
            loads()
    save_file(whole | {"model.vlm_att_more": whole["model.vlm_att_query"]}, file)
    with pytest.raises(InputError, match=r"unexpected in .*: model\.vlm_att_more"):
        loads()


def test_damaged_towers_are_one_sentence(tmp_path: Path) -> None:
    folder = llama_vid(tmp_path, None)
    file = folder / "model.safetensors"
    whole = load_file(file)
    for name in ("pos_embed", "patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"):
        save_file({n: a for n, a in whole.items() if n != eva.PREFIX + name}, file)
        with pytest.raises(InputError, match=r"hold an EVA tower .* without"):
            opened(folder)
    positions = whole[f"{eva.PREFIX}pos_embed"][:, :-1].copy()
    save_file(whole | {f"{eva.PREFIX}pos_embed": positions}, file)
    with pytest.raises(InputError, match="width 88 with 16 positions is given"):
        opened(folder)


# ------------------------------------------------------------------------------- BERT's tokenizer


def open_whole(folder: Path) -> Any:
    return open_folder(
        folder, dtype="float32", vision_tower=None, template=None, max_length=None, compressor=HEADS
    )


def test_questions_are_read_as_berts_code_does(tmp_path: Path) -> None:
    folder = llama_vid(tmp_path)
    few = compressors.Declaration(places=(), question=8, question_vocabulary=32)
    with pytest.raises(InputError, match="tokenizer of 33 tokens, but the model's compressor kn"):
        question_ids.reader_for(folder, few)
    declared = compressors.Declaration(places=(), question=8, question_vocabulary=34)
    reader = question_ids.reader_for(folder, declared)
    ids = {letter: 4 + n for n, letter in enumerate("abcdefghijklmnopqrstuvwxyz?. ")}
    assert reader("Why?").tolist() == [2, *(ids[x] for x in "why?"), 3]
    # At most eight, cut on the left.
    assert reader("what is it").tolist() == [2, *(ids[x] for x in " is it"), 3]
    assert reader("[DEC]").tolist() == [2, 33, 3]


def test_a_compressor_that_was_trained_here_is_asked_in_the_words_that_it_knows(
    tmp_path: Path,
) -> None:
    """The digits world's own, to which no [DEC] was added."""
    words = build_tokenizer()
    own = compressors.Declaration(places=(), question=8, question_vocabulary=len(words))
    words.save_pretrained(tmp_path / question_ids.FOLDER)
    reader = question_ids.reader_for(tmp_path, own)
    asked = "which digit is in row 1?"
    assert reader(asked).tolist() == question_ids.reader_of_words(words, own)(asked).tolist()


def test_a_folder_without_bert(tmp_path: Path) -> None:
    folder = llama_vid(tmp_path)
    (tmp_path / "bert-base-uncased").rename(tmp_path / "bert")
    with pytest.raises(InputError, match="neither in it nor next to it: put the folder bert-base"):
        open_whole(folder)
