"""Tests that sandbox images are real, repeatable, different from each other, and legible."""

import asyncio
import itertools
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from msgspec import structs
from PIL import Image, ImageChops

from imagegen.errors import UpstreamError
from imagegen.providers.drawing import render
from imagegen.providers.drawing.caption import lay_out
from imagegen.providers.drawing.lettering import broken, fit, readable, text_width
from imagegen.providers.protocol import Call, Provider
from imagegen.providers.sandbox import SandboxProvider
from imagegen.tasks.validation import parse
from tests.emulated_jobs import Recorder
from tests.image_bytes import decoded
from tests.providers.conftest import data_of
from tests.support import over_rows

SIZES = [(64, 64), (512, 512), (640, 360), (360, 640), (2048, 64), (64, 2048)]
LINEAR = [(v / 255 / 12.92) if v <= 10 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in range(256)]
LONG = "A very detailed photograph of a market square in the rain, " * 60


def call(
    prompt: str = "a fox in the snow", seed: int | None = None, index: int = 0, count: int = 1, **fields: Any
) -> Call:
    return Call(
        parse({"prompt": prompt} | fields, default_model="any/model", aliases={}), count, first_index=index, seed=seed
    )


async def draw(watcher: Recorder, *args: Any, **fields: Any) -> bytes:
    reply = await SandboxProvider(0).generate(call(*args, **fields), watcher)
    (image,) = reply.images
    return data_of(image)


def visibly_different(one: bytes, other: bytes) -> float:
    """Return the share of pixels with a visible difference."""
    channels = ImageChops.difference(decoded(one).convert("RGB"), decoded(other).convert("RGB")).split()
    largest = ImageChops.lighter(ImageChops.lighter(channels[0], channels[1]), channels[2]).histogram()
    return sum(largest[13:]) / sum(largest)


def luminance(colour: tuple[int, int, int]) -> float:
    """Return the relative luminance of WCAG 2: https://www.w3.org/TR/WCAG22/#dfn-relative-luminance"""
    red, green, blue = colour
    return 0.2126 * LINEAR[red] + 0.7152 * LINEAR[green] + 0.0722 * LINEAR[blue]


def test_the_sandbox_implements_the_provider_interface() -> None:
    provider: Provider = SandboxProvider(1.0)
    assert (provider.name, provider.max_images_per_call, provider.own_hosts) == ("sandbox", 1, frozenset())


async def test_the_sandbox_lists_a_model() -> None:
    provider = SandboxProvider(1.0)
    assert [model["id"] for model in await provider.models()] == ["sandbox"]
    await provider.close()


def test_pillow_is_not_imported_until_an_image_is_drawn() -> None:
    code = "import sys, imagegen.providers.sandbox; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
async def test_the_image_has_the_requested_size_and_format(watcher: Recorder, output_format: str) -> None:
    image = decoded(await draw(watcher, width=320, height=200, output_format=output_format))
    assert (image.size, image.format, image.mode) == ((320, 200), output_format.upper(), "RGB")


async def test_the_default_format_is_png(watcher: Recorder) -> None:
    assert decoded(await draw(watcher)).format == "PNG"


@pytest.mark.parametrize("size", SIZES)
async def test_every_size_is_drawn_with_every_kind_of_prompt(watcher: Recorder, size: tuple[int, int]) -> None:
    for prompt in ("cat", LONG, "一只狐狸在雪地里，水彩画", "🦊\u200d🏽", "\u0301", "x" * 4000):
        image = await draw(watcher, prompt, width=size[0], height=size[1], output_format="jpeg")
        assert decoded(image).size == size


@pytest.mark.parametrize("index", range(7))
async def test_every_scene_is_drawn_at_the_largest_size(watcher: Recorder, index: int) -> None:
    assert decoded(await draw(watcher, index=index, width=2048, height=2048, output_format="jpeg")).size == (2048, 2048)


async def test_images_that_are_made_afresh_differ_unless_there_is_a_seed(watcher: Recorder) -> None:
    async def bytes_of(repeat: int, seed: int | None = None) -> bytes:
        wanted = structs.replace(call(seed=seed, width=128, height=128), repeat=repeat)
        return data_of((await SandboxProvider(0).generate(wanted, watcher)).images[0])

    first, second, third = [await bytes_of(repeat) for repeat in (0, 1_764_000_000_000_001, 1_764_000_000_000_008)]
    assert len({first, second, third}) == 3
    assert min(visibly_different(first, second), visibly_different(second, third)) > 0.2
    assert await bytes_of(1_764_000_000_000_001) == second
    assert await bytes_of(0, seed=5) == await bytes_of(9, seed=5)


async def test_equal_requests_produce_equal_bytes(watcher: Recorder) -> None:
    scenes = [("png", index, seed) for index in range(7) for seed in (None, 5)]
    for output_format, index, seed in [*scenes, ("jpeg", 0, None), ("webp", 0, None)]:
        wishes = {"index": index, "seed": seed, "output_format": output_format, "width": 128, "height": 128}
        assert await draw(watcher, **wishes) == await draw(watcher, **wishes)


async def test_another_process_draws_the_same_bytes(watcher: Recorder) -> None:
    code = (
        "import sys; from imagegen.providers.drawing.render import Drawing, DrawingSpec\n"
        "picture = Drawing(DrawingSpec('a fox in the snow', 7, 2, 128, 128, 'png'))\n"
        "picture.paint(); picture.blur_card(); picture.write_words(); sys.stdout.buffer.write(picture.encode())"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
    other, _ = await process.communicate()
    assert await draw(watcher, seed=7, index=2, width=128, height=128) == other


@pytest.mark.parametrize(("seed", "name"), [(None, "no seed"), (41, "a seed")])
async def test_all_images_of_a_task_differ_in_a_fifth_of_the_pixels(
    watcher: Recorder, seed: int | None, name: str
) -> None:
    images = [
        await draw(watcher, seed=None if seed is None else seed + i, index=i, width=128, height=128) for i in range(8)
    ]
    for one, other in itertools.combinations(images, 2):
        assert visibly_different(one, other) > 0.2, name


async def test_prompts_with_one_scene_differ_in_a_fifth_of_the_pixels(watcher: Recorder) -> None:
    alike: dict[tuple[int, int], list[str]] = {}
    for prompt in (f"prompt {number}" for number in range(400)):
        number = render._number(prompt)
        alike.setdefault((number % 7, number // 1_000 % 11), []).append(prompt)
    assert len(alike) == 77
    for one, other in [prompts[:2] for prompts in alike.values() if len(prompts) > 1]:
        first, second = (
            await draw(watcher, one, width=64, height=64),
            await draw(watcher, other, width=64, height=64),
        )
        assert visibly_different(first, second) > 0.2, (one, other)


async def test_prompts_one_letter_apart_differ_in_a_fifth_of_the_pixels(watcher: Recorder) -> None:
    first, second = await draw(watcher, "a fox"), await draw(watcher, "a box")
    assert visibly_different(first, second) > 0.2


@pytest.mark.parametrize("seeds", [(None, 0), (0, 1), (0, 7), (0, 77), (5, 2**63 - 1)])
async def test_seeds_differ_in_a_fifth_of_the_pixels(watcher: Recorder, seeds: tuple[int | None, ...]) -> None:
    first, second = [await draw(watcher, seed=seed, width=128, height=128) for seed in seeds]
    assert visibly_different(first, second) > 0.2


def brightest(image: Image.Image, box: tuple[int, int, int, int]) -> float:
    part = image.crop(box)
    colours: Any = part.getcolors(part.width * part.height)
    return max(luminance(colour) for _, colour in colours)


@over_rows("size", [*SIZES, (256, 256)])
@over_rows("prompt", ["cat", LONG, "一只狐狸在雪地里，水彩画"])
def test_words_and_mark_contrast_with_their_background(size: tuple[int, int], prompt: str) -> None:
    card = lay_out(*size, prompt)
    line = card.bottom - card.padding - card.mark_size
    left, right = card.left + card.padding, card.right - card.padding
    words, mark = (left, card.top + card.padding, right, line), (left, line, right, card.bottom - card.padding)
    for index in range(7) if size == (256, 256) else (size[0] % 7, size[1] % 7 + 1):
        sheet = render.Drawing(render.DrawingSpec(prompt, None, index, *size, "png"))
        sheet.paint()
        sheet.blur_card()
        bare = sheet._canvas.image.copy()
        sheet.write_words()
        for box, least in ((words, 6.0), (mark, 3.5)):
            contrast = (brightest(sheet._canvas.image, box) + 0.05) / (brightest(bare, box) + 0.05)
            assert contrast > least, index


@over_rows("size", [*SIZES, (2048, 2048), (128, 64)])
@over_rows("prompt", ["cat", "a fox in the snow", LONG, "一只狐狸在雪地里" * 200, "W" * 500])
def test_the_words_are_legible_and_inside_the_image(size: tuple[int, int], prompt: str) -> None:
    card = lay_out(*size, prompt)
    assert card.lines.size >= max(9, min(size) // 40)
    assert 0 <= card.left < card.right <= size[0]
    assert 0 <= card.top < card.bottom <= size[1]
    assert card.lines.width <= card.right - card.left - card.padding
    assert len(card.lines.rows) * card.lines.leading <= card.bottom - card.top
    assert card.lines.rows[0].startswith(prompt[:3])


def test_a_short_prompt_is_shown_whole_in_the_smallest_image() -> None:
    assert " ".join(lay_out(64, 64, "a fox in the snow").lines.rows) == "a fox in the snow"


def test_a_long_prompt_ends_with_an_ellipsis() -> None:
    lines = lay_out(64, 64, LONG).lines
    assert not lines.whole
    assert lines.rows[-1].endswith("…")


def test_a_shorter_prompt_has_larger_letters() -> None:
    sizes = [lay_out(512, 512, "word " * count).lines.size for count in (2, 40, 90)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_every_image_is_marked() -> None:
    assert lay_out(512, 512, "cat").mark == "imagegen sandbox"
    assert lay_out(64, 64, "cat").mark == "sandbox"


@over_rows(
    "text",
    [
        "Ein Fuchs im Schnee, für dich",
        "Лиса в снегу",
        "一只狐狸在雪地里，水彩画",
        "繁體中文字",
        "日本の古い町並み",
        "사이버펑크 도시",
    ],
)
def test_scripts_in_the_fonts_are_drawn(text: str) -> None:
    assert readable(text) == text


def test_an_emoji_becomes_its_name() -> None:
    assert readable("a 🦊\ufe0f, 🌈") == "a :fox face:, :rainbow:"


def test_a_character_that_no_font_has_becomes_its_code_point() -> None:
    assert readable("ก") == "0E01"


def test_white_space_becomes_single_spaces() -> None:
    assert readable("  a\n\n b\tc ") == "a b c"


def test_lines_break_between_words_and_between_chinese_characters() -> None:
    assert broken("red fox", 20, text_width("red f", 20), 3).rows == ("red", "fox")
    assert broken("狐狸雪地", 20, 45, 3).rows == ("狐狸", "雪地")


def test_no_line_starts_with_a_chinese_comma() -> None:
    assert broken("狐狸，雪地", 20, 45, 4).rows == ("狐", "狸，", "雪地")


def test_korean_words_are_not_broken() -> None:
    assert broken("도시의 밤거리", 20, text_width("도시의 밤", 20), 3).rows == ("도시의", "밤거리")


def test_the_last_line_is_not_a_single_word() -> None:
    lines = fit("one two three four five", range(20, 19, -1), text_width("one two three four", 20), 200)
    assert lines.rows == ("one two three", "four five")


async def test_each_step_is_reported_in_order(watcher: Recorder) -> None:
    await SandboxProvider(0).generate(call(), watcher)
    assert watcher.sent_count == 1
    assert watcher.parts == [0.4, 0.6, 0.8, 1.0]


async def test_several_images_of_one_call_share_its_progress(watcher: Recorder) -> None:
    reply = await SandboxProvider(0).generate(call(count=2, width=64, height=64), watcher)
    assert len({data_of(image) for image in reply.images}) == 2
    assert watcher.parts == [0.2, 0.3, 0.4, 0.5, 0.7, 0.8, 0.9, 1.0]


async def test_a_call_for_the_second_image_equals_a_joint_call(watcher: Recorder) -> None:
    joint = await SandboxProvider(0).generate(call(count=2, seed=8, width=64, height=64), watcher)
    alone = await draw(watcher, seed=9, index=1, width=64, height=64)
    assert data_of(joint.images[1]) == alone


async def test_an_image_takes_its_delay(watcher: Recorder) -> None:
    started_s = time.monotonic()
    await SandboxProvider(0.3).generate(call(width=64, height=64), watcher)
    assert 0.3 <= time.monotonic() - started_s < 20


async def test_drawing_happens_off_the_event_loop(watcher: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set()
    for step in ("paint", "blur_card", "write_words", "encode"):
        real = getattr(render.Drawing, step)

        def noted(self: render.Drawing, real: Callable[[render.Drawing], object] = real) -> object:
            threads.add(threading.get_ident())
            return real(self)

        monkeypatch.setattr(render.Drawing, step, noted)
    await draw(watcher, width=64, height=64)
    assert threads
    assert threading.get_ident() not in threads


async def test_a_cancelled_call_ends_at_once(watcher: Recorder) -> None:
    running = asyncio.create_task(SandboxProvider(600).generate(call(), watcher))
    await asyncio.wait_for(watcher.on_wire.wait(), 20)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, 20)
    assert watcher.parts == []


@pytest.mark.parametrize("mark", ["[slow:٩]", "[slow:９]"])
async def test_digits_of_other_scripts_cause_no_delay(watcher: Recorder, mark: str) -> None:
    async with asyncio.timeout(20):
        await SandboxProvider(0).generate(call(f"a snail {mark}", width=64, height=64), watcher)


async def test_a_prompt_can_request_a_slow_image(watcher: Recorder) -> None:
    started_s = time.monotonic()
    await SandboxProvider(0).generate(call("a snail [slow:0.3]", width=64, height=64), watcher)
    assert time.monotonic() - started_s >= 0.3


@pytest.mark.parametrize(
    ("code", "retryable", "ambiguous", "status"),
    [
        ("content_policy", False, False, 422),
        ("upstream_invalid_request", False, False, 400),
        ("upstream_auth", False, False, 401),
        ("upstream_billing", False, False, 402),
        ("model_not_available", False, False, 404),
        ("upstream_rate_limited", True, False, 429),
        ("upstream_overloaded", True, False, 503),
        ("upstream_error", True, False, 500),
        ("upstream_timeout", True, True, None),
        ("upstream_bad_response", False, False, 200),
    ],
)
async def test_a_prompt_can_request_a_failure(
    watcher: Recorder, code: str, retryable: bool, ambiguous: bool, status: int | None
) -> None:
    with pytest.raises(UpstreamError) as caught:
        await SandboxProvider(0).generate(call(f"a cat [fail:{code}]"), watcher)
    error = caught.value
    assert (error.code, error.retryable, error.ambiguous, error.status) == (code, retryable, ambiguous, status)
    assert (error.retry_after_s is not None) == (code == "upstream_rate_limited")
    assert watcher.sent_count == 1


async def test_a_failure_without_a_number_never_ends(watcher: Recorder) -> None:
    provider = SandboxProvider(0)
    for _ in range(4):
        with pytest.raises(UpstreamError):
            await provider.generate(call("[fail:upstream_error]"), watcher)


async def test_a_failure_with_a_number_ends_and_starts_again(watcher: Recorder) -> None:
    provider = SandboxProvider(0)
    wanted = call("[fail:upstream_error:2]", width=64, height=64)
    for _ in range(2):
        for _ in range(2):
            with pytest.raises(UpstreamError):
                await provider.generate(wanted, watcher)
        assert (await provider.generate(wanted, watcher)).images


async def test_a_rate_limit_without_a_number_ends_after_one_call(watcher: Recorder) -> None:
    provider = SandboxProvider(0)
    wanted = call("[fail:upstream_rate_limited]", width=64, height=64)
    with pytest.raises(UpstreamError):
        await provider.generate(wanted, watcher)
    assert (await provider.generate(wanted, watcher)).images


async def test_a_code_that_does_not_exist_is_only_a_word(watcher: Recorder) -> None:
    assert await draw(watcher, "[fail:nothing]", width=64, height=64)
