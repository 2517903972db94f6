from tests.tiny import fast_compilation

__all__ = ["fast_compilation"]
