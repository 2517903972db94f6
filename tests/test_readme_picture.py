"""README's picture: what it shows is what the model computes, and both of its themes are drawn."""

import importlib.util

import jax.numpy as jnp
import numpy as np
from PIL import Image

from llava_mini_jax.models import llava_mini
from tests import tiny
from tests.conftest import ROOT

fast_compilation = tiny.fast_compilation

spec = importlib.util.spec_from_file_location("picture", ROOT / "docs" / "site" / "picture.py")
assert spec is not None and spec.loader is not None
picture = importlib.util.module_from_spec(spec)
spec.loader.exec_module(picture)


def test_words_read_what_they_read_in_prefusion():
    """The observed pass ends in the text that the model fuses; words see no more than patches."""
    cfg = tiny.model("paper", grid=1)
    params = tiny.on_device(tiny.weights(cfg))
    size = cfg.vision.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (1, 1, size, size, 3), np.uint8)
    ids_F = np.arange(3, 10, dtype=np.int32)
    reads_NFP, text_IFD = picture.read_by_words(params, jnp.asarray(pixels), ids_F, cfg)
    fused_IFD = llava_mini.embed_text(params, jnp.asarray(ids_F)[None], cfg)
    _, fused_IFD = llava_mini.encode_images(params, jnp.asarray(pixels), fused_IFD, cfg)
    np.testing.assert_allclose(text_IFD, fused_IFD, atol=1e-4)
    patches = cfg.vision.grid**2
    assert reads_NFP.shape == (cfg.prefusion_layers, len(ids_F), patches)
    shares_NF = np.asarray(reads_NFP).sum(axis=2)
    assert (shares_NF > 0).all() and (shares_NF < 1).all()


def test_both_themes_show_the_patch_and_whether_an_answer_is_right():
    page = Image.new("RGB", (30, 30), (240, 230, 220))
    token_YX = np.zeros((3, 3))
    token_YX[2, 1] = 1
    asked = [picture.Asked("read row 1.", "8 1 3", "8 1 3"), picture.Asked("largest?", "6", "8")]
    words = ["which", "digit", "?"]
    found = picture.Found(page, token_YX, words, np.full((3, 3, 3), 0.1), asked)
    for theme in (picture.LIGHT, picture.DARK):
        sheet = picture.draw(found, theme)
        assert sheet.size == (picture.WIDTH * 2, picture.HEIGHT * 2)
        colours = {colour for _, colour in sheet.getcolors(2**24) or ()}
        for colour in (theme.right, theme.wrong, theme.hot):
            assert tuple(picture._rgb(colour)) in colours
        seen = np.asarray(picture._page(page, token_YX, theme)).astype(int)
        warm, faded = seen[-60, seen.shape[1] // 2], seen[60, 60]
        assert warm[0] - warm[2] > faded[0] - faded[2] + 40
