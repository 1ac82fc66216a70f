"""The client as a command: an image file as the input that the model declares."""

import json

import numpy as np
import pytest
from PIL import Image

from course.core import InputError
from serving import client
from serving.server import serve
from tests import serving_models


def test_pixels_go_as_they_are_to_a_model_of_floats(tmp_path, capsys):
    model = serving_models.save_convnet(tmp_path / "model" / "1")
    picture = Image.effect_noise((28, 28), 90)
    picture.save(tmp_path / "digit.png")
    with serve("convnet", tmp_path / "model") as server:
        server.wait_available(1)
        client.main([server.url, "convnet", str(tmp_path / "digit.png")])
    pixels = np.asarray(picture, np.float32).reshape(1, 28, 28, 1)
    assert pixels.max() > 200
    expected = np.asarray(model(pixels))[0]
    assert json.loads(capsys.readouterr().out) == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("url", ["http://127.0.0.1:abc", "http://\x00"])
def test_what_is_no_address_is_one_line(url):
    with pytest.raises(InputError, match=r"is no address of a server, as http://127\.0\.0\.1:8501"):
        client.main([url, "m", "digit.png"])
