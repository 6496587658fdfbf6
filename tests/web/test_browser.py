"""The page in a real browser, on the embedded base: from a photo to a file that plain diffusers loads."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path

import pytest
import skimage.data
from PIL import Image

from hyperdb.faces.image import read_text

pytest.importorskip("gradio", reason="the page is made with gradio: pip install -e '.[web]'")
playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")

ROOT = Path(__file__).parents[2]
WAIT = 120_000  # milliseconds: another program may have the processor

pytestmark = pytest.mark.slow
playwright.expect.set_options(timeout=WAIT)


@pytest.fixture(scope="module")
def url(tmp_path_factory, chromium, served):
    folder = tmp_path_factory.mktemp("page")
    with served(folder, "finetune.steps=4", "diffusion.steps=6", "upload=1") as (address, temporary, _):
        yield address, temporary


@pytest.fixture(scope="module")
def browser(chromium):
    with playwright.sync_playwright() as driver:
        yield driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


def visit(browser, url, width=1440, **looks):
    """Open the page as a new visitor who reaches nobody else."""
    page = browser.new_context(viewport={"width": width, "height": 900}, **looks).new_page()
    page.set_default_timeout(WAIT)
    page.foreign = []
    page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else page.foreign.append(r.url))
    page.goto(url)
    page.get_by_role("button", name="Personalise", exact=True).wait_for()
    return page


@pytest.fixture
def photo(tmp_path) -> Path:
    Image.fromarray(skimage.data.astronaut()).save(tmp_path / "me.jpg")
    return tmp_path / "me.jpg"


def choose(page, photo: Path) -> None:
    page.locator("#photo input[type=file]").set_input_files(photo)


def personalise(page, name: str, consent: bool = False) -> None:
    page.locator("#seen img").first.wait_for()
    if consent:
        page.get_by_label("The person in this photo agreed").check()
    page.get_by_label("Name", exact=True).fill(name)
    page.get_by_role("button", name="Personalise", exact=True).click()


def download(page, part: str, folder: Path) -> Path:
    page.locator(f"{part}:not([disabled])").wait_for()
    with page.expect_download() as started:
        page.locator(part).click()
    path = folder / started.value.suggested_filename
    started.value.save_as(path)
    return path


def test_from_a_photo_to_a_file_for_diffusers(browser, url, photo, tmp_path):
    address, temporary = url
    page = visit(browser, address)
    choose(page, photo)
    personalise(page, "Eileen")
    page.locator("#work [role=alert]", has_text="tick the line of consent").wait_for()
    personalise(page, "Eileen", consent=True)
    page.locator("#work progress").wait_for()
    page.locator("#work figure").nth(3).wait_for()
    captions = page.locator("#work figcaption").all_inner_texts()
    assert captions == ["the photo", "the base, of anybody", "the prediction", "fine-tuned"]

    # --- pictures
    page.locator("#style label", has_text="oil").click()
    playwright.expect(page.get_by_label("Prompt")).to_have_value("an oil painting of a [V] face")
    page.get_by_role("button", name="Draw", exact=True).click()
    page.locator("#gallery img").nth(3).wait_for()
    alt = page.locator("#gallery img").nth(2).get_attribute("alt")
    assert alt == "an oil painting of a Eileen face · seed 2"
    page.locator("#gallery button.thumbnail-item").nth(2).click()
    page.locator("#about", has_text="seed 2, strength 1").wait_for()
    picture = download(page, "#about a", tmp_path)
    assert (read_text(picture)["seed"], read_text(picture)["synthetic"]) == ("2", "true")
    page.get_by_role("button", name="More like this").click()
    page.locator("#gallery img[alt$='seed 7']").first.wait_for()

    # --- the shelf
    before = page.locator("#seen img").first.get_attribute("src")
    page.locator(".hd-examples button").nth(1).click()
    playwright.expect(page.locator("#seen img").first).not_to_have_attribute("src", before)
    personalise(page, "Bob")
    page.locator("#shelf figure").nth(1).wait_for()
    page.get_by_role("button", name="Mix", exact=True).click()
    page.locator("#shelf figure", has_text="Bob and Eileen").wait_for()
    page.locator("#shift-hair input[type=number]").fill("2")
    page.get_by_role("button", name="Change", exact=True).click()
    page.locator("#shelf figure").nth(3).wait_for()
    assert page.locator("#shelf figcaption").all_inner_texts()[3] == "Bob and Eileen, hair +2"

    # --- to take along
    page.wait_for_timeout(1000)  # the file of the newest person takes the place of the one before
    file = download(page, "#file", tmp_path)
    assert file.name == "Bob_and_Eileen_hair_2.safetensors"
    with zipfile.ZipFile(download(page, "#zip", tmp_path)) as packed:
        listed = json.loads(packed.read("pictures.json"))
        assert len(packed.namelist()) == 9
    assert [one["seed"] for one in listed] == [str(seed) for seed in range(8)]
    assert {(one["synthetic"], one["person"]) for one in listed} == {("true", "Eileen")}
    assert page.foreign == []
    # by itself or by the button that it stands on
    assert page.evaluate("[...document.images].filter(e => !e.alt && !e.closest('button[aria-label]')).length") == 0
    in_diffusers(file)

    # --- and gone
    (root,) = temporary.glob("hyperdb-web-*")
    assert list(root.rglob("adapter.safetensors"))
    page.context.close()
    other = visit(browser, address)
    other.wait_for_timeout(3000)
    assert not [path for path in root.rglob("*") if path.is_file()]
    other.context.close()


def in_diffusers(file: Path) -> None:
    """Load a kohya file into the plain pipeline: the picture becomes another."""
    import numpy as np
    import torch
    from diffusers import StableDiffusionPipeline

    from hyperdb.runtime.paths import resolve

    pipe = StableDiffusionPipeline.from_pretrained(resolve("package:embedded/base"), safety_checker=None)
    pipe.set_progress_bar_config(disable=True)

    def drawn():
        noise = torch.Generator().manual_seed(0)
        return np.asarray(pipe("a sks face", num_inference_steps=4, generator=noise).images[0], float)

    before = drawn()
    pipe.load_lora_weights(str(file))
    assert np.abs(drawn() - before).mean() > 5
    pipe.unload_lora_weights()
    assert np.abs(drawn() - before).max() == 0


def test_bad_uploads_are_said_in_the_page(browser, url, photo, tmp_path):
    page = visit(browser, url[0], 390)
    (tmp_path / "no.jpg").write_text("not a picture")
    choose(page, tmp_path / "no.jpg")
    page.locator("#seen [role=alert]", has_text="your photo is not an image").wait_for()
    Image.new("RGB", (300, 300), "grey").save(tmp_path / "grey.png")
    choose(page, tmp_path / "grey.png")
    page.locator("#seen [role=alert]", has_text="no face found in your photo").wait_for()
    page.get_by_role("button", name="Personalise", exact=True).click()
    page.locator("#work [role=alert]", has_text="choose a photo first").wait_for()
    (tmp_path / "big.png").write_bytes(b"\x89PNG" + b"0" * 1_500_000)
    choose(page, tmp_path / "big.png")
    page.get_by_text("exceed the maximum allowed size").first.wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    choose(page, photo)
    page.locator("#seen figure").nth(1).wait_for()
    page.context.close()


def test_two_visitors_at_once_are_apart(browser, url, photo):
    one, other = visit(browser, url[0]), visit(browser, url[0])
    choose(one, photo)
    other.locator(".hd-examples button").first.click()
    personalise(one, "Eileen", consent=True)
    personalise(other, "Nobody")
    for page, mine in ((one, "Eileen"), (other, "Nobody")):
        page.locator("#shelf figure").first.wait_for()
        assert page.locator("#shelf figcaption").all_inner_texts() == [mine]
    one.get_by_role("button", name="Draw", exact=True).click()
    one.locator("#gallery img").first.wait_for()
    assert other.locator("#gallery img").count() == 0
    addresses = {image.get_attribute("src") for image in one.locator("#gallery img").all()}
    assert len(addresses) == 4
    assert all(len(address.split("/")[-3]) == 32 for address in addresses)  # not to be guessed
    for page in (one, other):
        page.context.close()


def test_it_is_used_by_keyboard(browser, url):
    page = visit(browser, url[0])
    page.locator(".hd-examples button").first.focus()
    page.keyboard.press("Enter")
    page.locator("#seen img").first.wait_for()
    parts, reached = ["called", "personalise", "prompt", "draw", "more", "mix", "change"], set()
    inside = "parts => parts.filter(part => document.getElementById(part).contains(document.activeElement))"
    for _ in range(120):
        page.keyboard.press("Tab")
        reached |= set(page.evaluate(inside, parts))
    assert reached == set(parts)
    page.context.close()


@pytest.mark.parametrize(("width", "colours"), [(1440, "light"), (390, "dark")])
def test_it_is_readable_wide_and_narrow_light_and_dark(browser, chromium, served, tmp_path, request, width, colours):
    """Walk through the page at the shipped settings; --write-screenshots puts what is seen into docs/."""
    with served(tmp_path) as (address, _, _):
        page = visit(browser, address, width, color_scheme=colours)
        before = ""
        for number, name in enumerate(["Ada", "Eve"]):
            page.locator(".hd-examples button").nth(number).click()
            seen = page.locator("#seen img").first
            seen.wait_for()
            playwright.expect(seen).not_to_have_attribute("src", before)
            before = seen.get_attribute("src")
            personalise(page, name)
            page.locator("#shelf figure").nth(number).wait_for()
        page.get_by_role("button", name="Mix", exact=True).click()
        page.locator("#shelf figure").nth(2).wait_for()
        page.locator("#who label", has_text="Eve").first.click()
        page.locator("#style label", has_text="oil").click()
        playwright.expect(page.get_by_label("Prompt")).to_have_value("an oil painting of a [V] face")
        page.get_by_role("button", name="Draw", exact=True).click()
        page.locator("#gallery img").nth(3).wait_for()
        page.locator("#about img").wait_for()
        page.wait_for_timeout(1000)
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert contrast(page, ".hd-limits") > 4.5  # WCAG 2, level AA
        assert contrast(page, "#shelf figcaption") > 4.5
        shot = page.screenshot(full_page=True)
        page.context.close()
    assert Image.open(io.BytesIO(shot)).width == width
    if request.config.getoption("--write-screenshots"):
        picture = Image.open(io.BytesIO(shot)).convert("RGB").quantize(192, dither=Image.Dither.NONE)
        picture.save(ROOT / "docs" / f"web-{width}.png", optimize=True)


def contrast(page, part: str) -> float:
    """Return the ratio of luminances of a part's text and of what is behind it (WCAG 2, 1.4.3)."""
    inks = page.evaluate(
        """part => {
            const text = document.querySelector(part), clear = 'rgba(0, 0, 0, 0)';
            let behind = text;
            while (behind && getComputedStyle(behind).backgroundColor === clear) behind = behind.parentElement;
            return [getComputedStyle(text).color, getComputedStyle(behind || document.body).backgroundColor];
        }""",
        part,
    )

    def luminance(ink: str) -> float:
        levels = [int(float(number)) / 255 for number in re.findall(r"[\d.]+", ink)[:3]]
        linear = [level / 12.92 if level <= 0.04045 else ((level + 0.055) / 1.055) ** 2.4 for level in levels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, inks))
    return (high + 0.05) / (low + 0.05)
