"""What the page shows of a visit, as HTML: every word of a visitor's is escaped, every picture has a text beside it."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hyperdb.web.session import Person, Photo, Picture, Progress

WIDEST = 384  # pixels of a picture inside the page


def picture(source: Path | NDArray[np.uint8], text: str) -> str:
    """Return an `img` that holds the picture itself, so that no other page can ask for it; `text` is said of it."""
    from PIL import Image

    image = Image.open(source) if isinstance(source, Path) else Image.fromarray(source)
    image = image.convert("RGB")
    image.thumbnail((WIDEST, WIDEST))
    held = io.BytesIO()
    image.save(held, "PNG")
    data = base64.b64encode(held.getvalue()).decode()
    return f'<img src="data:image/png;base64,{data}" alt="{escape(text)}" width="{image.width}">'


def figure(source: Path | NDArray[np.uint8], caption: str, text: str = "") -> str:
    """Return a picture with its caption."""
    return f"<figure>{picture(source, text or caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def error(text: str) -> str:
    """Return a message that is read out at once."""
    return f'<p class="hd-error" role="alert">{escape(text)}</p>'


def notes(texts: Iterable[str]) -> str:
    """Return notices, a paragraph each."""
    return "".join(f'<p class="hd-note">{escape(text)}</p>' for text in texts)


def photo(found: Photo) -> str:
    """Show a photo, the face that is meant, and its crop or why there is none."""
    several = len(found.faces)
    said = "one face" if several == 1 else f"{several} faces, numbered from the largest"
    shown = [f'<div class="hd-photo">{figure(found.marked, f"Your photo: {said}")}']
    if found.chosen.crop is not None:
        shown.append(figure(found.chosen.crop, "What is learned from", "the face, cut out and turned upright"))
        rest = notes([found.chosen.said] if found.chosen.said else [])
    else:
        rest = error(found.chosen.said)
    return f"{''.join(shown)}</div>{rest}"


def curve(losses: Sequence[float], of: int) -> str:
    """Draw the losses of `of` iterations, as many as there are, as a line; "" before the second."""
    if len(losses) < 2:
        return ""
    low, high = min(losses), max(losses)
    scale = 36 / (high - low) if high > low else 0
    points = " ".join(
        f"{2 + 96 * i / max(of - 1, 1):.1f},{38 - (value - low) * scale:.1f}" for i, value in enumerate(losses)
    )
    said = f"loss from {losses[0]:.4f} to {losses[-1]:.4f} after {len(losses)} of {of} iterations"
    return (
        f'<svg class="hd-curve" viewBox="0 0 100 40" preserveAspectRatio="none" role="img" aria-label="{said}">'
        f'<polyline points="{points}" vector-effect="non-scaling-stroke"/></svg>'
    )


def progress(now: Progress) -> str:
    """Show how far a work is; a screen reader is told of each phase, not of each step."""
    if now.phase == "waiting":
        ahead = "You are next." if now.done == 0 else f"{now.done} before you."
        return f'<div class="hd-work" role="status"><p>Waiting for your turn. {ahead}</p></div>'
    share = min(1.0, now.done / now.of) if now.of else 0.0
    counted = f"{now.done} of {now.of}" if now.of > 1 else ""
    loss = f", loss {now.losses[-1]:.4f}" if now.losses else ""
    return (
        f'<div class="hd-work"><p><b role="status">{escape(now.phase)}</b> {counted}{loss}'
        f'<span class="hd-clock">{now.seconds:.1f} s</span></p>'
        f'<progress value="{share:.3f}" max="1" aria-label="{escape(now.phase)}"></progress>'
        f"{curve(now.losses, now.of if now.phase == 'fine-tuning' else len(now.losses))}</div>"
    )


def made(person: Person) -> str:
    """Show what was compared with what, and how long it took."""
    figures = "".join(figure(path, label, f"{label}: {person.name}") for label, path in person.row.items())
    took = f"{person.name}, made in {person.seconds:.1f} s."
    return f'<p role="status">{escape(took)}</p><div class="hd-row">{figures}</div>'


def shelf(people: Iterable[Person]) -> str:
    """Show the portraits of everybody."""
    cards = "".join(figure(one.portrait, one.name, f"portrait of {one.name}") for one in people)
    return f'<div class="hd-shelf">{cards}</div>' if cards else '<p class="hd-note">Nobody yet.</p>'


def caption(one: Picture) -> str:
    """Say of a picture what it is of."""
    return f"{one.wish.prompt.replace('[V]', one.wish.person)} · seed {one.seed}"


def about(one: Picture) -> str:
    """Show a picture large, as the file that it is, and say what made it."""
    guidance = one.wish.subject_guidance
    guided = "" if guidance is None else f", subject guidance {guidance:g}"
    address = f"gradio_api/file={quote(str(one.path))}"
    return (
        f'<figure class="hd-picked"><img src="{address}" alt="{escape(caption(one))}">'
        f"<figcaption>{escape(one.wish.person)}: <code>{escape(one.wish.prompt)}</code>, seed {one.seed}, strength "
        f"{one.wish.strength:g}{guided}. The picture is synthetic, and its file says so. "
        f'<a href="{address}" download="{escape(one.path.name)}">Download it</a></figcaption></figure>'
    )
