"""Data sets written by other packages, for tests/data/test_data_folders.py.

    python make_data_folders.py OUT      with: pip install datasets webdataset pillow

saved/        datasets: messages with content lists, Image feature, save_to_disk in two shards
strings/      datasets: messages of strings, one row of text alone, as trl writes them
split/        a DatasetDict of two splits
hub.parquet   datasets: to_parquet, conversations of {from, value}, images a list of Image
shards/       webdataset: pages-000000.tar, pages-000001.tar of KEY.png and KEY.json
versions.txt  what wrote them
"""

import io
import json
import sys
from pathlib import Path

import datasets
import webdataset
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as Pictures

OUT = Path(sys.argv[1])


def picture(number):
    return Pictures.new("RGB", (8, 8), (20 * number, 0, 0))


def png(number):
    content = io.BytesIO()
    picture(number).save(content, "PNG")
    return content.getvalue()


PART = {"type": Value("string"), "text": Value("string")}
LISTS = Features(
    {
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": List(PART)}),
        "source": Value("string"),
    }
)
STRINGS = Features(
    {
        "id": Value("string"),
        "images": List(Image()),
        "messages": List({"role": Value("string"), "content": Value("string")}),
    }
)
TURNS = Features(
    {
        "id": Value("string"),
        "images": List(Image()),
        "conversations": List({"from": Value("string"), "value": Value("string")}),
    }
)


def parts(number):
    asked = [{"type": "image", "text": None}, {"type": "text", "text": "Which page?"}]
    answer = [{"type": "text", "text": f"Page {number}."}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


def said(number, mark="<image>\n"):
    asked, answer = f"{mark}Which page?", f"Page {number}."
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


rows = [{"images": [picture(n)], "messages": parts(n), "source": "pages"} for n in range(5)]
Dataset.from_list(rows, features=LISTS).save_to_disk(OUT / "saved", num_shards=2)
rows = [{"id": f"s{n}", "images": [picture(n)], "messages": said(n)} for n in range(2)]
rows.append({"id": "text", "images": [], "messages": said(9, "")})
strings = Dataset.from_list(rows, features=STRINGS)
strings.save_to_disk(OUT / "strings")
DatasetDict(train=strings, test=strings.select([2])).save_to_disk(OUT / "split")
rows = [
    {
        "id": f"h{n}",
        "images": [picture(n)],
        "conversations": [
            {"from": "human", "value": "<image>\nWhich page?"},
            {"from": "gpt", "value": f"Page {n}."},
        ],
    }
    for n in range(3)
]
Dataset.from_list(rows, features=TURNS).to_parquet(OUT / "hub.parquet")
(OUT / "shards").mkdir()
pattern = str(OUT / "shards" / "pages-%06d.tar")
with webdataset.ShardWriter(pattern, maxcount=3, verbose=0) as sink:
    for n in range(5):
        turns = [{"from": "human", "value": "<image>\nWhich page?"}]
        turns.append({"from": "gpt", "value": f"Page {n}."})
        row = {"id": f"w{n}", "conversations": turns}
        sink.write({"__key__": f"book.v1/page{n}", "png": png(n), "json": json.dumps(row)})
(OUT / "versions.txt").write_text(
    f"datasets {datasets.__version__}\nwebdataset {webdataset.__version__}\n"
)
