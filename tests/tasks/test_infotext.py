"""Tests of the text of an image's parameters, read back by the patterns of AUTOMATIC1111's web UI."""

from __future__ import annotations

import json
import re

from imagegen import __version__
from imagegen.tasks.infotext import infotext
from imagegen.tasks.validation import parse
from tests.support import over_rows

# modules/infotext_utils.py of v1.10.1
PARAMETER = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def read_as_a1111_does(text: str) -> dict[str, str]:
    """Return prompt, negative prompt and parameters as `parse_generation_parameters` of the web UI does."""
    *lines, last = text.strip().split("\n")
    if len(PARAMETER.findall(last)) < 3:
        lines.append(last)
        last = ""
    prompt, negative, is_negative = "", "", False
    for raw in lines:
        line = raw.strip()
        if line.startswith("Negative prompt:"):
            is_negative, line = True, line[16:].strip()
        if is_negative:
            negative += ("" if negative == "" else "\n") + line
        else:
            prompt += ("" if prompt == "" else "\n") + line
    values = {name: json.loads(value) if value[:1] == '"' else value for name, value in PARAMETER.findall(last)}
    return {"Prompt": prompt, "Negative prompt": negative} | values


def text_of(seed: int | None = 7, model: str = "black-forest-labs/FLUX.1-schnell", **fields: object) -> str:
    request = parse({"prompt": "a fox"} | fields, default_model="m", aliases={})
    return infotext(request, model=model, seed=seed, width=640, height=384)


def test_all_parameters_are_read_back_by_the_web_ui() -> None:
    text = text_of(steps=20, guidanceScale=7.5, negativePrompt="blurry, dark\nugly")
    assert read_as_a1111_does(text) == {
        "Prompt": "a fox",
        "Negative prompt": "blurry, dark\nugly",
        "Steps": "20",
        "CFG scale": "7.5",
        "Seed": "7",
        "Size": "640x384",
        "Model": "black-forest-labs/FLUX.1-schnell",
        "Version": f"imagegen {__version__}",
    }


def test_parameters_that_were_not_sent_are_left_out_and_the_rest_is_still_read() -> None:
    assert read_as_a1111_does(text_of(seed=None)) == {
        "Prompt": "a fox",
        "Negative prompt": "",
        "Size": "640x384",
        "Model": "black-forest-labs/FLUX.1-schnell",
        "Version": f"imagegen {__version__}",
    }


@over_rows("model", ["flux:dev", "a, b", 'the "best"', "图像/模型"])
def test_a_model_name_with_separators_is_quoted(model: str) -> None:
    assert read_as_a1111_does(text_of(model=model))["Model"] == model


@over_rows("prompt", ["Steps: 3, Seed: 4, Size: 1x1", "two\nlines, one: two", "狐狸在雪中 🦊", "a" * 32_000])
def test_any_prompt_is_read_back_whole(prompt: str) -> None:
    read = read_as_a1111_does(text_of(prompt=prompt))
    assert (read["Prompt"], read["Seed"]) == (prompt, "7")
