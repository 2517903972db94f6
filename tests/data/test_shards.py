"""Images and rows in tar shards and in buckets: the same samples in the same order as in a
folder, and everything that is damaged, changed or unknown is refused."""

import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from PIL import Image

from llava_mini_jax import cli
from llava_mini_jax.data.batches.examples import BatchLayout, Buckets
from llava_mini_jax.data.batches.pipeline import make_batches
from llava_mini_jax.data.sets import audit, data_files, tar_shards
from llava_mini_jax.data.sets.fingerprint import changes, fingerprint
from llava_mini_jax.data.sets.sources import Dataset, Samples
from llava_mini_jax.data.sets.yaml_list import read_list
from llava_mini_jax.errors import InputError, LostError
from tests import tiny_model
from tests.data.data_files import config_of, turns
from tests.data.test_build import ENCODE

FORMATS = {"gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT, "ustar": tarfile.USTAR_FORMAT}
LONG = "d" * 90 + "/" + "n" * 60 + ".png"  # more than a header has room for
NAMES = ("coco/0.png", "coco/1.png", "é 数/2.png", LONG, "4.png", "5.png", "film.mp4")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "llava-mini-jax" / "tars"


@pytest.fixture
def bucket():
    """(URL of an empty folder, what writes into it): fsspec's own file system in memory."""
    fs: Any = fsspec.filesystem("memory")
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]

    def put(name: str, content: bytes) -> None:
        fs.pipe(f"/bucket/{name}", content)

    yield "memory://bucket", put
    fs.store.clear()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """NAMES as files, and rows.json about them and a text."""
    folder = tmp_path_factory.mktemp("media")
    for number, name in enumerate(NAMES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".mp4":
            tiny_model.write_video(path, seconds=2)
        else:
            Image.new("RGB", (9, 8), (40 * number, 0, 0)).save(path)
    made = [{"id": n, "image": n, "conversations": turns()} for n in NAMES[:-1]]
    made.append({"id": "film", "video": NAMES[-1], "conversations": turns()})
    made.append({"q": "what is it?", "a": "the digit is 3", "video_id": "film"})
    made.append({"id": "text", "conversations": turns("hello")})
    (folder / "rows.json").write_text(json.dumps(made))
    return folder


def pack(path: Path, members: dict[str, bytes], form: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in NAMES}


def two_shards(folder: Path, out: Path, form: int = tarfile.GNU_FORMAT) -> str:
    items = list(files_of(folder).items())
    pack(out / "page-000.tar", dict(items[:4]), form)
    pack(out / "page-001.tar", dict(items[4:]), form)
    return str(out / "page-{000..001}.tar")


def read(samples: Samples) -> list[Any]:
    """Ids, conversations and decoded media of all samples."""
    found = []
    for i in range(len(samples)):
        sample = samples[i]
        image = sample.get("image", b"")
        content = Path(image).read_bytes() if isinstance(image, str) else image
        frames = [frame.tobytes() for frame in sample.get("frames", ())]
        found.append((sample["id"], sample["conversations"], content, frames))
    return found


def batches(samples: Samples, first_step: int, count: int) -> list[Any]:
    layout = BatchLayout(
        tokens_per_image=1,
        buckets=Buckets(lengths=(64, 128), images=(1, 2, 4, 8, 16)),
        max_length=128,
        padding_side="right",
    )
    stream = make_batches(samples, ENCODE, layout, batch_size=4, seed=3, first_step=first_step)
    return list(itertools.islice(stream, count))


# --- Images in shards -----------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_shards_give_the_samples_of_a_folder(folder, tmp_path, form):
    rows = str(folder / "rows.json")
    plain = read(Samples(config_of(Dataset(path=rows))))
    shards = two_shards(folder, tmp_path, FORMATS[form])
    assert read(Samples(config_of(Dataset(path=rows, images=shards)))) == plain
    starred = str(tmp_path / "page-*.tar")
    assert read(Samples(config_of(Dataset(path=rows, images=starred)))) == plain


def test_batches_are_those_of_a_folder_and_a_run_goes_on_with_them(folder, tmp_path):
    rows = str(folder / "rows.json")
    plain = batches(Samples(config_of(Dataset(path=rows))), 0, 4)
    config = config_of(Dataset(path=rows, images=two_shards(folder, tmp_path)))
    packed = batches(Samples(config), 0, 2) + batches(Samples(config), 2, 2)
    for ours, theirs in zip(packed, plain, strict=True):
        assert not ours.rejected
        np.testing.assert_array_equal(ours.arrays.inputs.ids_BT, theirs.arrays.inputs.ids_BT)
        pixels = (b.arrays.inputs.pixels_BIJYXC for b in (ours, theirs))
        np.testing.assert_array_equal(*pixels)


@pytest.mark.skipif(shutil.which("tar") is None, reason="there is no tar program")
def test_what_gnu_tar_packs_of_a_folder(folder, tmp_path):
    packed = tmp_path / "all.tar"
    (tmp_path / "link").symlink_to(folder / "4.png")
    command = ["tar", "-cf", str(packed), "-C", str(folder), ".", "-C", str(tmp_path), "link"]
    subprocess.run(command, check=True)
    shards = tar_shards.open_shards(packed)
    assert {name: shards.picture(name, "") for name in NAMES} == files_of(folder)
    assert shards.picture("./coco/../4.png", "") == (folder / "4.png").read_bytes()
    for name in ("link", "coco", "5.jpg"):
        with pytest.raises(InputError, match=rf"row 1: there is no image '{name}' in .*all\.tar"):
            shards.picture(name, "row 1")
    with pytest.raises(InputError, match=r"row 1: there is no video 'movie' in"):
        shards.video("movie", "row 1")


def test_the_index_is_made_once_for_a_shard_that_stays_the_same(folder, tmp_path, cache):
    def opened() -> bytes:
        return tar_shards.open_shards(tmp_path / "one.tar").picture("a.png", "")

    pack(tmp_path / "one.tar", {"a.png": b"first"})
    assert opened() == b"first"
    (kept,) = cache.iterdir()
    assert cache.stat().st_mode & 0o77 == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tar_shards, "_scan", None)  # nobody calls it
        assert opened() == b"first"
    for content in (b"", kept.read_bytes()[:100], b"PK\3\4" + b"x" * 50):
        kept.write_bytes(content)
        assert opened() == b"first"
    with np.load(kept) as arrays:
        np.savez(kept, **{**arrays, "sizes": arrays["sizes"] + 10**9})
    assert opened() == b"first"
    pack(tmp_path / "one.tar", {"b.png": b"longer than before", "a.png": b"other"})
    assert opened() == b"other"


def test_an_index_that_somebody_else_has_written_is_not_believed(tmp_path, cache, monkeypatch):
    pack(tmp_path / "one.tar", {"a.png": b"first"})
    tar_shards.open_shards(tmp_path / "one.tar")
    made = []
    scan = tar_shards._scan
    monkeypatch.setattr(tar_shards, "_scan", lambda *given: made.append(1) or scan(*given))
    tar_shards.open_shards(tmp_path / "one.tar")
    assert made == []
    monkeypatch.setattr(os, "getuid", lambda: cache.stat().st_uid + 1)
    tar_shards.open_shards(tmp_path / "one.tar")
    assert made == [1]


def test_a_shard_that_changes_under_a_run_ends_it(folder, tmp_path):
    rows, path = str(folder / "rows.json"), tmp_path / "one.tar"
    pack(path, files_of(folder))
    samples = Samples(config_of(Dataset(path=rows, images=str(path))))
    assert samples[0]["image"]
    other = dict(reversed(files_of(folder).items()))  # of the same size in all
    pack(path, other)
    with pytest.raises(LostError, match=r"one\.tar has changed since it was opened: 'coco/0\.png'"):
        samples[0]
    with pytest.raises(LostError):  # and is no broken sample
        batches(samples, 0, 1)
    path.unlink()
    with pytest.raises(LostError, match=r"one\.tar was there and can no longer be read"):
        samples[0]


def test_a_run_that_goes_on_knows_other_shards(folder, tmp_path):
    rows = str(folder / "rows.json")
    config = config_of(Dataset(path=rows, images=two_shards(folder, tmp_path)))
    before = fingerprint(Samples(config))
    assert before["rows"]["pictures"]["film.mp4"] == (folder / "film.mp4").stat().st_size
    assert changes(before, fingerprint(Samples(config))) == []
    assert before == fingerprint(Samples(config_of(Dataset(path=rows))))  # names and sizes alike
    pack(tmp_path / "page-001.tar", {"4.png": b"x"})
    told = changes(before, fingerprint(Samples(config)))
    assert any("have other sizes, such as " in clause for clause in told)


# --- Rows in shards -------------------------------------------------------------------------------


def row_of(number: int, **more: Any) -> bytes:
    return json.dumps({"id": number, "conversations": turns(), **more}).encode()


def test_rows_of_a_shard_have_what_lies_beside_them(folder, tmp_path):
    png, film = (folder / "4.png").read_bytes(), (folder / "film.mp4").read_bytes()
    members = {
        "b/1.json": row_of(1, image="coco/train2017/1.png"),
        "b/1.png": png,
        "a.v2/2.mp4": film,
        "a.v2/2.json": row_of(2),
        "a.v2/._2.json": b"of another system",
        "3.json": json.dumps({"conversations": turns("hello")}).encode(),
        "4.json": row_of(4, image="b/1.png"),  # an image that another one has too
    }
    pack(tmp_path / "rows.tar", members)
    samples = Samples(config_of(tmp_path / "rows.tar"))
    assert [samples.id_of(i) for i in range(4)] == [1, 2, "rows-2", 4]
    assert samples[0]["image"] == samples[3]["image"] == png and "image" not in samples[2]
    assert len(list(samples[1]["frames"])) == 2
    assert samples.parts[0].rows.place(1) == f"{tmp_path / 'rows.tar'}, a.v2/2.json"
    before = fingerprint(samples)
    pack(tmp_path / "rows.tar", {**members, "b/1.json": members["b/1.json"].replace(b"3", b"9")})
    told = changes(before, fingerprint(Samples(config_of(tmp_path / "rows.tar"))))
    assert told == ["rows.tar has other content of the same size"]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({}, "holds no samples"),
        ({"1.json": row_of(1), "1.txt": b"a caption"}, "has '1.txt', which is not read"),
        ({"1.json": row_of(1), "1.seg.png": b""}, "has '1.seg.png', which is not read"),
        ({"1.json": row_of(1), "1.png": b"", "1.jpg": b""}, "has '1.png' and '1.jpg'; a sample"),
        ({"1.json": row_of(1), "2.png": b""}, "1 files such as '2.png' without a .json"),
        ({"1.json": row_of(1), "./1.json": row_of(2)}, "two files called '1.json'"),
    ],
)
def test_what_a_shard_of_rows_may_not_hold(members, message, tmp_path):
    pack(tmp_path / "rows.tar", members)
    with pytest.raises(InputError, match=message) as refused:
        Samples(config_of(tmp_path / "rows.tar"))
    assert "\n" not in str(refused.value)


def test_a_row_that_names_another_picture_is_refused(tmp_path):
    pack(tmp_path / "rows.tar", {"1.json": row_of(1, image="2.png"), "1.png": b"png"})
    with pytest.raises(InputError, match=r"rows\.tar, 1\.json: its \"image\" is '2\.png', but"):
        Samples(config_of(tmp_path / "rows.tar"))[0]
    pack(tmp_path / "rows.tar", {"1.json": b"{", "1.png": b"png"})
    with pytest.raises(InputError, match=r"rows\.tar, 1\.json: not valid JSON"):
        Samples(config_of(tmp_path / "rows.tar"))[0]


# --- Damage ---------------------------------------------------------------------------------------


def test_a_damaged_shard_is_one_sentence_or_the_files_that_it_holds(folder, tmp_path):
    whole = pack(tmp_path / "whole.tar", files_of(folder), tarfile.PAX_FORMAT).read_bytes()
    rng, path, refused = random.Random(0), tmp_path / "cut.tar", 0
    cuts = [*range(0, len(whole) - 10240, 512), *(rng.randrange(len(whole)) for _ in range(40))]
    damaged = [whole[:at] for at in cuts]
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(rng.choice((1, 3, 30))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(content))
    damaged += [whole + whole, b"", b"\x1f\x8b" + whole, b"\0" * 5000, whole[:512] * 3]
    for content in damaged:
        path.write_bytes(content)
        try:
            shards = tar_shards.open_shards(path)
        except InputError as error:
            refused += 1
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        for number, name in enumerate(shards.names):
            assert len(shards.read(number)) == shards.size(number)
            assert not name.startswith("/")
    assert refused >= len(cuts) - 20  # what is cut in its last zeros is whole


@pytest.mark.parametrize("form", FORMATS)
def test_a_shard_that_was_cut_between_files_is_no_smaller_one(form, tmp_path):
    """tarfile itself ends there without a word, and at a damaged header too."""
    path = tmp_path / "cut.tar"
    members = {f"{'n' * 120}/{number}.json": row_of(number) for number in range(4)}
    if form == "ustar":
        members = {f"{number}.json": row_of(number) for number in range(4)}
    whole = pack(path, members, FORMATS[form]).read_bytes()
    end = len(whole.rstrip(b"\0"))
    for at in range(0, end, 512):
        path.write_bytes(whole[:at])
        with pytest.raises(InputError, match=r"Cannot read the tar file .*cut\.tar: "):
            tar_shards.open_shards(path)
    header = whole.index(b"ustar", whole.index(b"ustar", 1) + 512) & ~511
    path.write_bytes(whole[:header] + b"?" + whole[header + 1 :])
    with pytest.raises(InputError, match=r"Cannot read the tar file .*cut\.tar: "):
        tar_shards.open_shards(path)


@pytest.mark.parametrize("size", [-1, -512, -(10**9), 2**60])
def test_sizes_that_cannot_be_end_no_process(size, tmp_path):
    member = tarfile.TarInfo("a.png")
    member.size = size
    header = member.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(header + b"\0" * 10240)
    with pytest.raises(InputError, match=r"Cannot read the tar file .*a\.tar"):
        tar_shards.open_shards(tmp_path / "a.tar")


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("a.tar.gz", "is compressed, which cannot be read at random; unpack it"),
        ("a.tgz", "is compressed"),
        ("nothing.tar", "there is no such file"),
        ("nothing-*.tar", "There are no files"),
        ("page-{1..0}.tar", "is not a range"),
        ("page-{0..99999999}.tar", "is not a range"),
        ("page-{000..001}.tar", "page-000.tar: there is no such file"),
        ("[ab]/same.tar", "two files named same.tar"),
    ],
)
def test_places_of_shards_that_cannot_be(place, message, folder, tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        pack(tmp_path / name / "same.tar", {f"{name}.png": b""})
    dataset = Dataset(path=str(folder / "rows.json"), images=str(tmp_path / place))
    with pytest.raises(InputError, match=message):
        Samples(config_of(dataset))


# --- Buckets --------------------------------------------------------------------------------------


def filled(bucket, folder: Path) -> str:
    url, put = bucket
    for name, content in files_of(folder).items():
        put(f"media/{name}", content)
    put("media/rows.json", (folder / "rows.json").read_bytes())
    return url


def test_a_bucket_gives_the_samples_of_a_folder(bucket, folder, tmp_path):
    url, put = filled(bucket, folder), bucket[1]
    rows = folder / "rows.json"
    plain = read(Samples(config_of(rows)))
    assert read(Samples(config_of(Dataset(path=str(rows), images=f"{url}/media/")))) == plain
    assert read(Samples(config_of(f"{url}/media/rows.json"))) == plain
    listed = json.loads(rows.read_text())
    for row in listed[:2]:
        row["image"] = f"{url}/media/{row['image']}"
    put("rows.jsonl", "\n".join(map(json.dumps, listed)).encode())
    whole = Dataset(path=f"{url}/rows.jsonl", images=f"{url}/media")
    assert read(Samples(config_of(whole)))[:6] == plain[:6]
    two_shards(folder, tmp_path)
    for path in tmp_path.glob("*.tar"):
        put(f"shards/{path.name}", path.read_bytes())
    for pattern in ("page-*.tar", "page-{000..001}.tar"):
        shards = Dataset(path=str(rows), images=f"{url}/shards/{pattern}")
        assert read(Samples(config_of(shards))) == plain
    config = config_of(Dataset(path=str(rows), images=f"{url}/media"))
    assert fingerprint(Samples(config)) == fingerprint(Samples(config_of(rows)))
    manifest = audit.audit(config_of(f"{url}/media/rows.json"), workers=2)
    assert manifest["rejected"] == [] and manifest["datasets"][0]["files"][0]["bytes"] > 0


def test_parquet_and_shards_of_rows_in_a_bucket(bucket, tmp_path):
    import pyarrow
    from pyarrow import parquet

    url, put = bucket
    made = [{"id": f"p{i}", "conversations": turns("hello", str(i))} for i in range(7)]
    for number, some in enumerate((made[:4], made[4:])):
        path = tmp_path / "rows.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(some), path, row_group_size=2)
        put(f"hub/train-0000{number}-of-00002.parquet", path.read_bytes())
    for place in (f"{url}/hub", f"{url}/hub/train-*.parquet"):
        samples = Samples(config_of(place))
        assert [samples[i]["id"] for i in range(7)] == [f"p{i}" for i in range(7)]
        assert fingerprint(samples)
    pack(tmp_path / "rows.tar", {"1.json": row_of(1), "1.png": b"png"})
    put("rows.tar", (tmp_path / "rows.tar").read_bytes())
    assert Samples(config_of(f"{url}/rows.tar"))[0]["image"] == b"png"


def test_a_shard_that_is_replaced_in_a_bucket_is_another_one(bucket, tmp_path):
    url, put = bucket
    put("a.tar", pack(tmp_path / "a.tar", {"a.png": b"first"}).read_bytes())
    shards = tar_shards.open_shards(f"{url}/*.tar")
    put("a.tar", pack(tmp_path / "a.tar", {"b.png": b"", "a.png": b"other"}).read_bytes())
    with pytest.raises(LostError, match=r"memory://.*a\.tar has changed since it was opened"):
        shards.picture("a.png", "")
    assert tar_shards.open_shards(f"{url}/*.tar").picture("a.png", "") == b"other"


def test_what_is_not_in_a_bucket(bucket, folder):
    url, put = filled(bucket, folder), bucket[1]
    row = {"id": 1, "image": "gone.png", "conversations": turns()}
    film = {"id": 2, "video": "gone", "conversations": turns()}
    away = {"id": 3, "image": "http://elsewhere/a.png", "conversations": turns()}
    put("media/odd.json", json.dumps([row, film, away]).encode())
    samples = Samples(config_of(f"{url}/media/odd.json"))
    for index, message in enumerate(
        ["there is no image 'gone.png' in", "there is no video", "is not in memory://"]
    ):
        with pytest.raises(InputError, match=message):
            samples[index]
    assert fingerprint(samples)["odd"]["pictures"] == {
        "gone.png": -1,
        "http://elsewhere/a.png": -1,
    }
    for place, message in (
        (f"{url}/media/none.json", "there is no such file"),
        (f"{url}/media/a.csv", 'ends in ".csv"'),
        (f"{url}/none-*.parquet", "There are no files"),
        (f"{url}/media", "holds no .parquet files"),
        ("nowhere://a/b.json", "cannot be used .*Protocol not known"),
    ):
        with pytest.raises(InputError, match=message) as refused:
            Samples(config_of(place))
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match="There is nothing at memory://bucket/none"):
        Samples(config_of(Dataset(path=f"{url}/media/odd.json", images=f"{url}/none")))


def test_a_bucket_that_does_not_answer_ends_a_run_and_sets_nothing_aside(
    bucket, folder, monkeypatch
):
    url = filled(bucket, folder)
    samples = Samples(config_of(Dataset(path=str(folder / "rows.json"), images=f"{url}/media")))

    def broken(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(fsspec.get_filesystem_class("memory"), "cat_file", broken)
    with pytest.raises(LostError, match=r"Cannot read .* \(no route to host\); check the network"):
        samples[0]
    with pytest.raises(LostError):
        batches(samples, 0, 1)


def test_a_package_that_is_not_there_is_named(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    dataset = Dataset(path=str(folder / "rows.json"), images="gs://bucket/media")
    with pytest.raises(InputError, match=r"pip install 'llava-mini-jax\[gcs\]'"):
        Samples(config_of(dataset))


# --- Lists and commands ---------------------------------------------------------------------------


def test_lists_name_shards_and_buckets(folder, tmp_path, capsys):
    two_shards(folder, tmp_path)
    shutil.copy(folder / "rows.json", tmp_path / "rows.json")
    text = "datasets: [{json_path: rows.json, image_folder: 'page-{000..001}.tar'}]"
    (tmp_path / "mix.yaml").write_text(text)
    (dataset,) = read_list(tmp_path / "mix.yaml")
    assert dataset.images == str(tmp_path / "page-{000..001}.tar")
    (tmp_path / "far.yaml").write_text("datasets: [{json_path: 'gs://b/a.json', image_folder: c}]")
    (dataset,) = read_list(tmp_path / "far.yaml")
    assert (dataset.path, dataset.images) == ("gs://b/a.json", str(tmp_path / "c"))
    assert cli.main(["data", "verify", str(tmp_path / "mix.yaml")]) == 0
    assert capsys.readouterr().out == "rows: 6 image, 2 video, 1 text, 0 rejected\n"


def test_verify_names_what_is_broken_in_shards(folder, tmp_path, capsys):
    shards = pack(tmp_path / "a.tar", {**files_of(folder), "4.png": b"no image"})
    arguments = ["data", "verify", str(folder / "rows.json"), "--images", str(shards)]
    assert cli.main(arguments) == 1
    out = capsys.readouterr().out
    assert out.startswith("rows: 5 image, 2 video, 1 text, 1 rejected\n  '4.png': Cannot read the")


def test_ranges_in_names_are_those_of_webdataset():
    named = data_files._numbered("{0..1}-{08..10}.tar")
    assert named == [f"{a}-{b}.tar" for a in (0, 1) for b in ("08", "09", "10")]
    assert data_files._numbered("plain.tar") == ["plain.tar"]
