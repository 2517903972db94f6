"""The judge's server that several files ask."""

from tests.evaluation.judge_server import serve  # noqa: F401  a fixture
