from __future__ import annotations

import base64
import io
import json
import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.client import HTTPConnection, HTTPResponse

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from digitdist.config import ModelConfig
from digitdist.data import DATA_SETS, ImageSet, Splits, mnist_form, picture_form
from digitdist.demo import server as module
from digitdist.demo.answer import Answerer
from digitdist.demo.features import FeatureModel, TrainingFeatures
from digitdist.demo.page import render_page
from digitdist.demo.server import Content, DemoServer
from digitdist.errors import UserError
from digitdist.models import build_model
from digitdist.predict import predict

MNIST = DATA_SETS["mnist"]
NASTY = "\"><script src=http://x.invalid/a.js></script>'&"


@pytest.fixture(scope="module")
def images(splits: Splits) -> ImageSet:
    return splits.train.subset(torch.arange(100))


@pytest.fixture(scope="module")
def server(images: ImageSet) -> Iterator[DemoServer]:
    """A server about a network that was not trained, and 100 training images."""
    model = FeatureModel(build_model(ModelConfig(), seed=0, info=MNIST).eval(), MNIST, "fp32")
    answer = Answerer(model, TrainingFeatures(model, images))
    with DemoServer(0) as server:
        thread = threading.Thread(target=server.serve, args=[render_page("mine", "about", "note", MNIST, 5), answer])
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server: DemoServer, method: str, path: str, body: bytes | None = None, **headers: str) -> HTTPResponse:
    """The answer to a request of its own connection, with `headers` in the place of those that a client sends by itself."""
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    given = {"Host": f"127.0.0.1:{server.server_port}", **headers}
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    if body is not None and "Content-Length" not in given:
        given["Content-Length"] = str(len(body))
    for name, text in given.items():
        connection.putheader(name, text)
    connection.endheaders(body)
    return connection.getresponse()


def told(response: HTTPResponse) -> tuple[int, str]:
    """Status and error text of what was refused."""
    assert response.headers["Content-Type"] == "application/json"
    (item,) = json.loads(response.read()).items()
    assert item[0] == "error"
    return response.status, item[1]


def png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def seven() -> Image.Image:
    picture = Image.new("RGBA", (300, 300), "white")
    ImageDraw.Draw(picture).line([(90, 60), (200, 60), (140, 240)], fill="black", width=20, joint="curve")
    return picture


def pixels(address: str) -> torch.Tensor:
    """The image in a ``data:`` address."""
    content = base64.b64decode(address.removeprefix("data:image/png;base64,"))
    return torch.from_numpy(np.array(Image.open(io.BytesIO(content))))


def test_a_picture_is_predicted_as_by_predict_from_the_same_28_by_28_pixels(server: DemoServer, images: ImageSet):
    answer = json.loads(ask(server, "POST", "/predict", png(seven())).read())
    form = mnist_form(seven())
    assert torch.equal(pixels(answer["image"]), form)
    model = build_model(ModelConfig(), seed=0, info=MNIST).eval()
    assert answer["probabilities"] == predict(model, form[None], MNIST)[0].tolist()
    assert len(answer["neighbours"]) == 5
    cosines = [one["cosine"] for one in answer["neighbours"]]
    assert cosines == sorted(cosines, reverse=True)
    for one in answer["neighbours"]:
        assert torch.equal(pixels(one["image"]), images.images[one["index"]])
        assert one["class"] == str(images.labels[one["index"]].item())


def test_a_training_image_is_its_own_nearest(server: DemoServer, images: ImageSet):
    answer = json.loads(ask(server, "POST", "/predict", png(Image.fromarray(images.images[42].numpy()))).read())
    assert answer["neighbours"][0]["index"] == 42
    assert answer["neighbours"][0]["cosine"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"hello", 422, "it is not an image of a known format"),
        (b"", 422, "it is empty"),
        (png(seven())[:200], 422, "it cannot be decoded"),
        (png(Image.new("L", (448, 448), 255)), 422, "it is blank: there is no ink in it"),
        (png(Image.fromarray(np.hstack([seven(), seven()]))), 422, "it holds 2 digits side by side"),
    ],
    ids=["not a picture", "nothing", "cut off", "an empty canvas", "two digits"],
)
def test_what_holds_no_digit_is_told_in_words(server: DemoServer, body: bytes, status: int, text: str):
    code, error = told(ask(server, "POST", "/predict", body))
    assert code == status
    assert error.startswith(text)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:PORT", "127.0.0.1.evil.example:PORT", "127.0.0.2:PORT", "", ":PORT"]
)
@pytest.mark.parametrize("request_line", [("GET", "/"), ("POST", "/predict")])
def test_a_request_to_another_host_is_refused_as_one_after_dns_rebinding_is(
    server: DemoServer, host: str, request_line: tuple[str, str]
):
    response = ask(server, *request_line, Host=host.replace("PORT", str(server.server_port)))
    code, error = told(response)
    assert code == 403
    assert error.endswith(f"is not allowed; open {server.url}")


@pytest.mark.parametrize("host", ["localhost", "localhost:PORT", "LOCALHOST:PORT", "127.0.0.1", "127.0.0.1:9"])
def test_this_machine_may_be_named_in_each_way_also_at_the_other_end_of_a_tunnel(server: DemoServer, host: str):
    host = host.replace("PORT", str(server.server_port))
    assert ask(server, "GET", "/", Host=host).status == 200
    assert ask(server, "POST", "/predict", png(seven()), Host=host, Origin=f"http://{host}").status == 200


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1:PORT", "http://localhost:PORT"]
)
def test_a_page_of_another_origin_may_not_ask(server: DemoServer, origin: str):
    response = ask(server, "POST", "/predict", png(seven()), Origin=origin.replace("PORT", str(server.server_port)))
    code, error = told(response)
    assert (code, error.startswith("a page of ")) == (403, True)
    assert not [name for name in response.headers if name.startswith("Access-Control")]
    assert ask(server, "OPTIONS", "/predict", Origin="http://evil.example").status == 501


def test_a_request_that_is_too_large_is_refused_before_it_is_read(server: DemoServer):
    code, error = told(ask(server, "POST", "/predict", **{"Content-Length": str(module.MAX_BYTES + 1)}))
    assert (code, error) == (413, "the picture is larger than 32 MiB")
    assert told(ask(server, "POST", "/predict", **{"Content-Length": "9" * 5000}))[0] in (411, 413)


@pytest.mark.parametrize("length", [None, "-1", "12a", "²"])
def test_a_request_without_a_length_is_refused(server: DemoServer, length: str | None):
    headers = {"Transfer-Encoding": "chunked"} if length is None else {"Content-Length": length}
    assert told(ask(server, "POST", "/predict", **headers))[0] == 411


def test_an_address_that_is_not_there_is_told(server: DemoServer):
    assert told(ask(server, "GET", "/../config.yaml")) == (404, "there is no /../config.yaml")
    assert told(ask(server, "POST", "/", b"x"))[0] == 404


def test_a_fault_of_a_network_is_told_and_the_next_picture_answered(images: ImageSet):
    def fail(content: bytes) -> dict[str, object]:
        raise OSError("the disk is\ngone")

    with DemoServer(0) as server:
        thread = threading.Thread(target=server.serve, args=[{"/": Content("text/html", b"")}, fail])
        thread.start()
        connection = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
        for _ in range(2):
            connection.request("POST", "/predict", b"x")
            assert told(connection.getresponse()) == (500, "it cannot be predicted: the disk is gone")
        server.shutdown()
        thread.join()


def test_a_network_that_gives_no_numbers_is_an_error():
    model = build_model(ModelConfig(), seed=0, info=MNIST).eval()
    with torch.no_grad():
        model.linear2.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="no finite numbers"):
        Answerer(FeatureModel(model, MNIST, "fp32"), None)(png(seven()))


def test_in_colour_and_other_sizes_the_whole_picture_is_scaled_as_by_predict():
    info = replace(DATA_SETS["cifar10"], classes=("a", "b", "c"), width=40)
    training = ImageSet(torch.randint(0, 256, (9, *info.raw_shape), dtype=torch.uint8), torch.arange(9) % 3)
    model = FeatureModel(build_model(ModelConfig(), seed=0, info=info).eval(), info, "fp32")
    answer = Answerer(model, TrainingFeatures(model, training))(png(seven().rotate(10, fillcolor="red")))
    assert pixels(answer["image"]).shape == (32, 40, 3)
    assert torch.equal(pixels(answer["image"]).permute(2, 0, 1), picture_form(seven().rotate(10, fillcolor="red"), info))
    assert len(answer["probabilities"]) == 3
    assert {one["class"] for one in answer["neighbours"]} <= {"a", "b", "c"}
    first = answer["neighbours"][0]
    assert torch.equal(pixels(first["image"]).permute(2, 0, 1), training.images[first["index"]])


def test_only_this_machine_is_listened_to(server: DemoServer):
    assert server.server_address[0] == "127.0.0.1"
    with pytest.raises(OSError):  # noqa: PT011, each system has its own
        socket.create_connection(("127.0.0.2", server.server_port), timeout=5)


def test_a_port_that_cannot_be_had_is_one_line(server: DemoServer):
    with pytest.raises(UserError) as refused:
        DemoServer(server.server_port)
    assert (
        str(refused.value)
        == f"--port {server.server_port} cannot be had: it is in use; give another, or 0 for any that is free"
    )
    for port in (-1, 65536):
        with pytest.raises(UserError, match=f"--port {port} is not allowed; it takes 0 to 65535"):
            DemoServer(port)


def test_the_page_has_a_bar_a_class_escapes_everything_and_loads_from_here_alone(server: DemoServer):
    response = ask(server, "GET", "/")
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; img-src data:; connect-src 'self'")
    html = response.read().decode()
    assert "Draw a digit" in html
    assert len(re.findall("<tr>", html)) == 10
    assert set(re.findall(r'(?:src|href)="(.*?)"', html)) == {"data:,", "style.css", "page.js"}
    for name, type in (("style.css", "text/css"), ("page.js", "text/javascript")):
        file = ask(server, "GET", f"/{name}")
        assert file.headers["Content-Type"] == f"{type}; charset=utf-8"
        assert not re.search(r"https?://|@import|url\(", file.read().decode())
    info = replace(DATA_SETS["cifar10"], classes=(NASTY, "b", "c"))
    page = render_page(NASTY, NASTY, NASTY, info, 0)["/"].body.decode()
    assert "x.invalid" in page
    assert "<script src=http" not in page
    assert '"><' not in re.sub(r'"[^"<>]*"', "", page)
    assert "Draw a picture" in page
    assert len(re.findall("<tr>", page)) == 3
