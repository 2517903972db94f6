"""The web page's routes stand behind the same guard, and its work counts as an answer's."""

from typing import Any

from llava_mini_jax.serving import keys
from tests.serving import fake
from tests.serving.running import Client, running

CHAT = {"messages": [{"role": "user", "content": "hello"}]}


def test_the_page_is_open_and_what_it_asks_needs_the_key() -> None:
    with running(fake.service(keys=frozenset({keys.digest("k")}))) as client:
        page = client.send("/")
        assert page.status == 200 and page.headers["content-type"].startswith("text/html")
        assert "default-src 'self'" in page.headers["content-security-policy"]
        assert client.send("/page/main.js").status == 200
        assert client.send("/page/other.js").status == 401
        for path, body in (("/about", None), ("/look", CHAT), ("/compare", CHAT)):
            assert client.send(path, body).status == 401
        known = Client(client.port, "k")
        assert known.send("/about").json["model"] == fake.NAME


def test_its_work_is_let_in_as_answers_are() -> None:
    service = fake.service(max_queued=1)
    with running(service) as client:
        wrong: dict[str, Any] = {**CHAT, "temperature": 9}
        for path in ("/look", "/compare"):
            assert client.send(path, CHAT).error["code"] == 400  # it shows no image
            assert client.send(path, wrong).error["param"] == "temperature"
        assert service.admission.held == 0
        place = service.enter(1)
        assert client.send("/look", CHAT).status == 429
        place.leave()
