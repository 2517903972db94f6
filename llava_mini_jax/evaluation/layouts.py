"""Files of benchmarks, in both layouts, read so that a broken one is named with its place.

    LLaVA's          questions.jsonl, labels.json, images as files        --> rows, Paths
    Hugging Face's   CONFIG/SPLIT-00000-of-00001.parquet, anywhere below  --> rows, images' bytes

Rows are dicts. Whether image files are there is checked apart (`check_pictures`), before a model
is asked: who scores an answers file needs none of them.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava_mini_jax.errors import InputError
from llava_mini_jax.evaluation.benchmark import Output, Question, Rule, Scores

SHORT = "\nAnswer the question using a single word or phrase."  # ends LLaVA's short questions
LETTER = "\nAnswer with the option's letter from the given choices directly."  # and its choices


def read_json(path: Path) -> Any:
    return _parse(_bytes(path), str(path))


def read_list(path: Path) -> list[Any]:
    """Of JSON; raises InputError for anything but a list."""
    rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path} holds a {type(rows).__name__}; expected a list.")
    return rows


def texts(questions: Sequence[Question], answers: Mapping[str, Output]) -> dict[str, str]:
    """What was answered, by key, in the order of the questions; of those that have an answer."""
    return {q.key: answers[q.key].text for q in questions if q.key in answers}


def read_json_lines(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """The objects of a file that has one a line; blank lines are skipped.

    Raises InputError with the line's number for no JSON, or where `fields` are not all there.
    """
    rows = []
    for number, line in enumerate(_bytes(path).split(b"\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            rows.append(check_fields(_parse(line, place), fields, place))
    return rows


def parquet_files(folder: Path, *patterns: str) -> list[Path]:
    """The files of the first pattern that any file below the folder has, in order."""
    return next((files for p in patterns if (files := sorted(folder.rglob(p)))), [])


def parquet_instead(folder: Path, file: str, *patterns: str) -> list[Path]:
    """The parquet files, unless LLaVA's own `file` is there, which is preferred."""
    return [] if (folder / file).exists() else parquet_files(folder, *patterns)


def read_parquet(
    files: Sequence[Path], columns: Mapping[str, type], optional: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """The rows of these files; an image, {"bytes", "path"} there, comes as its bytes or None.

    All rows have the `columns`, of these types (InputError); `optional` ones are None where a file
    lacks them. An image that many rows have is held once.
    """
    import pyarrow.parquet as parquet

    rows: list[dict[str, Any]] = []
    held: dict[bytes, bytes] = {}
    for path in files:
        try:
            file = parquet.ParquetFile(path)
            there = file.schema_arrow.names
            lacking = [name for name in columns if name not in there]
            if lacking:
                raise InputError(
                    f"{path} has no column {', '.join(lacking)}; it has {', '.join(there)}. Get the"
                    " file again, or the data set that the documentation names."
                )
            wanted = [name for name in (*columns, *optional) if name in there]
            for batch in file.iter_batches(batch_size=256, columns=wanted):
                for row in batch.to_pylist():
                    if isinstance(picture := row.get("image"), Mapping):
                        # Rows about one image each bring its bytes; one copy of them is held.
                        content = picture.get("bytes")
                        row["image"] = content and held.setdefault(content, content)
                    place = f"{path}, row {len(rows) + 1}"
                    rows.append(check_fields({**dict.fromkeys(optional), **row}, columns, place))
        except (OSError, ValueError) as error:  # pyarrow's errors of damaged files are both
            if isinstance(error, InputError):
                raise
            reason = " ".join(str(error).split())
            raise InputError(f"Cannot read {path}: {reason}; copy or download it again.") from error
    return rows


def check_fields(row: Any, fields: Mapping[str, type], place: str) -> Any:
    """The row, if it is an object with all of `fields`, each of its type; else InputError."""
    if not isinstance(row, dict):
        raise InputError(f"{place}: a {type(row).__name__}; expected an object. Correct it.")
    for name, kind in fields.items():
        if not isinstance(row.get(name), kind):
            given = f"{row[name]!r:.60}" if name in row else "nothing"
            raise InputError(
                f'{place}: "{name}" is {given}; expected {kind.__name__}. It has'
                f" {', '.join(map(str, row))}; correct it or get the file again."
            )
    return row


def check_keys(benchmark: str, questions: Sequence[Question]) -> list[Question]:
    """The questions, if there are any and no two have one key; else InputError."""
    if not questions:
        raise InputError(f"{benchmark}: its files hold no question; get them again.")
    seen: set[str] = set()
    twice = [q.key for q in questions if q.key in seen or seen.add(q.key)]
    if twice:
        raise InputError(
            f"{benchmark}: {len(twice)} questions appear twice: {listed(twice)}. Remove the second"
            " ones, or get the file again."
        )
    return list(questions)


def check_pictures(benchmark: str, questions: Sequence[Question]) -> None:
    """Raises InputError if no image or video is where it belongs; to call before asking.

    That one of them is missing is told when it is to be asked about (run/runner.py).
    """
    given = [(q.key, path) for q in questions if isinstance(path := q.image or q.video, Path)]
    if given and not any(path.exists() for _, path in given):
        raise InputError(
            f"{benchmark}: none of {len(given)} images or videos exists:"
            f" {listed([f'{key} ({path})' for key, path in given])}. Put the files there."
        )


def check_prompts(
    benchmark: str,
    questions: Sequence[Question],
    answers: Mapping[str, Output],
    spelled: Callable[[str], str] = lambda text: text,
) -> None:
    """Raises InputError for answers whose recorded prompt lacks the first line of their question's.

    Where answers are joined by a number, files of two versions would meet without a word. `spelled`
    is applied to the prompts; answers that record none are taken as they are.
    """
    strange = []
    for question in questions:
        asked = question.prompt.removeprefix("<image>\n").split("\n")[0].strip().lower()
        answer = answers.get(question.key)
        if answer and answer.prompt and asked not in spelled(answer.prompt).lower():
            strange.append(question.key)
    if strange:
        raise InputError(
            f"{benchmark}: {len(strange)} of {len(answers)} answers were given to other questions"
            f" than the data's of the same id: {listed(strange)}. Use the data of their run."
        )


def check_same(benchmark: str, odd: Sequence[str], files: str, what: str = "questions") -> None:
    """Raises InputError if some are `odd`: in one of two files, which are about the same."""
    if odd:
        raise InputError(
            f"{benchmark}: {len(odd)} {what} are in only one of {files}: {listed(odd)}. Use files"
            " of the same version."
        )


def check_all_answered(
    benchmark: str, questions: Sequence[Question], answers: Mapping[str, Output]
) -> None:
    """Raises InputError unless every question has an answer; servers take nothing less."""
    missing = [q.key for q in questions if q.key not in answers]
    if missing:
        raise InputError(
            f"{benchmark}: {len(missing)} of {len(questions)} questions have no answer:"
            f" {listed(missing)}. A submission needs all of them; answer them first."
        )


def hidden(rule: str, parsed: Mapping[str, str], unparsed: Sequence[str]) -> Scores:
    """Scores of a split whose answers only a server has: the value is NaN."""
    details = {"hidden": "the server that takes the submission file has the answers"}
    rules = {rule: Rule(value=math.nan, items={}, scale=None, details=details)}
    return Scores(headline=rule, rules=rules, parsed=parsed, unparsed=unparsed)


def write_json(path: Path, value: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    return path


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """An object a line, in ASCII; scripts read them as Python, too, which JSON of texts is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def listed(names: Sequence[str], most: int = 8) -> str:
    """The names in one line, the first few if there are many."""
    more = f", ... ({len(names) - most} more)" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"The file {path} cannot be read: {error}; check it.") from error


def _parse(content: bytes, place: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{place}: not valid JSON ({error}); correct it or get it again."
        ) from error
