"""The page itself: which parts it has, and which of a session's methods each of them calls. Needs gradio.

What a page sends comes as it is sent, and `hyperdb.web.session` checks it; gradio's own preprocessing, which opens the
files that are named, is off. Of files gradio looks at uploads alone, and of addresses elsewhere at none (`OwnFiles`).
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import socket
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from hyperdb.formats.directions import ATTRIBUTES
from hyperdb.heads import PLACE_PHRASES, STYLE_PROMPTS, Identity
from hyperdb.heads.captions import prompt as compose
from hyperdb.runtime.errors import UserError
from hyperdb.tuning.personalizer import Personalizer
from hyperdb.web import Config, show
from hyperdb.web.session import AT_ONCE, Session, Sessions, Wish
from hyperdb.web.work import Left

EXAMPLES = (1_100_003, 1_100_014, 1_100_021, 1_100_030)  # of the test split
ENDS = {  # of each attribute's slider
    "sex": ("towards a woman", "towards a man"),
    "age": ("younger", "older"),
    "skin": ("lighter skin", "darker skin"),
    "hair": ("darker hair", "lighter hair"),
    "smile": ("less smile", "more smile"),
}
FURTHEST = 3.0  # of a shift, in standard deviations
LONGEST_REQUEST = 100_000  # bytes of what a page sends at once, photos apart
BROKEN = "something broke on the server, whose log says what; try again"

Update = dict[Any, Any]


class OwnFiles:
    """Refuses requests for which gradio would fetch something from elsewhere, and those of unreasonable length."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request of ASGI, or pass it on."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        refused = bool(re.search(r"file=\w+:|/proxy=", scope["path"]))
        if scope["method"] == "POST" and not scope["path"].endswith("/upload"):
            body, more = b"", True
            while more and len(body) <= LONGEST_REQUEST:
                part = await receive()
                body, more = body + part.get("body", b""), part.get("more_body", False)
            refused |= more or names_elsewhere(body)
            whole = [{"type": "http.request", "body": body}]
            receive = functools.partial(_replay, whole, receive)
        answer = PlainTextResponse("only what was made here is served", 404) if refused else self.app
        await answer(scope, receive, send)


async def _replay(whole: list[Any], receive: Any) -> Any:
    return whole.pop() if whole else await receive()


def names_elsewhere(body: bytes) -> bool:
    """Whether a request in JSON names a file by an address such as https://..."""

    def named(value: Any) -> bool:
        if isinstance(value, dict):
            address = isinstance(value.get("path"), str) and "://" in value["path"]
            return address or any(map(named, value.values()))
        return isinstance(value, list) and any(map(named, value))

    try:
        return named(json.loads(body))
    except (ValueError, RecursionError):
        return False  # gradio refuses it


def limits(config: Config) -> str:
    """Say in a sentence what the base can draw."""
    base, side = config.diffusion, config.diffusion.size
    if base.path.startswith("package:embedded"):
        return (
            f"The small base behind this page has only ever seen rendered heads, at {side} × {side} pixels: a real "
            "face becomes a rendered cousin of itself, not a likeness you could mistake for a photo."
        )
    return f"The base behind this page is {Path(base.path).name}, at {side} × {side} pixels."


def describe(person: int) -> str:
    """Say in three words who an example is."""
    found = Identity(person).attributes
    return f"{found['age']} {found['sex']}, {found['hair']} hair"


def build(sessions: Sessions) -> gr.Blocks:
    """Lay out the page and connect its parts with what a visitor's session does."""
    config = sessions.config
    usual = config.diffusion.subject_guidance or config.diffusion.guidance
    with gr.Blocks(title="hyperdb: one photo, that person in many styles", analytics_enabled=False) as page:
        gr.HTML(
            '<header class="hd-head"><h1>hyperdb</h1>'
            "<p>One photo of a face in. A hypernetwork predicts what a diffusion model has to change to draw this "
            f"person; a short fine-tuning finishes it.</p><p class='hd-limits'>{limits(config)}</p></header>"
        )
        with gr.Row(elem_classes="hd-columns"):
            with gr.Column(min_width=340, elem_classes="hd-card"):
                gr.HTML("<h2><span>1</span> A face</h2>")
                photo = gr.Image(
                    label="Drop, paste or take a photo", sources=["upload", "clipboard", "webcam"], type="filepath",
                    height=230, elem_id="photo", webcam_options=gr.WebcamOptions(mirror=False), buttons=[],
                )  # fmt: skip
                cut = gr.Checkbox(label="It is a crop of the face already", elem_id="cut")
                agreed = gr.Checkbox(
                    label="The person in this photo agreed to be personalised",
                    info="Personalise only people who did. Photos stay on this server and are removed when you leave.",
                    elem_id="agreed",
                )
                gr.HTML("<p class='hd-or'>or somebody who does not exist</p>")
                with gr.Row(elem_classes="hd-examples"):
                    examples = [gr.Button(describe(seed), size="sm", min_width=130) for seed in EXAMPLES]
                seen = gr.HTML(elem_id="seen", elem_classes="hd-said")
                face = gr.Radio(label="Which face", visible=False, elem_id="face")
                called = gr.Textbox(label="Name", placeholder="Person 1", max_length=60, elem_id="called")
                personalise = gr.Button("Personalise", variant="primary", elem_id="personalise")
                work = gr.HTML(elem_id="work", elem_classes="hd-said")
            with gr.Column(min_width=340, elem_classes="hd-card"):
                gr.HTML("<h2><span>2</span> Pictures</h2>")
                who = gr.Radio(label="Of whom", choices=[], elem_id="who", info="Personalise somebody first.")
                style = gr.Radio(label="Style", choices=list(STYLE_PROMPTS), value="sketch", elem_id="style",
                                 elem_classes="hd-chips")  # fmt: skip
                place = gr.Radio(label="Place", choices=["anywhere", *PLACE_PHRASES], value="anywhere",
                                 elem_id="place", elem_classes="hd-chips")  # fmt: skip
                prompt = gr.Textbox(label="Prompt", info="[V] stands for the person.", lines=2, elem_id="prompt",
                                    value=compose("sketch", "[V]"), max_length=500)  # fmt: skip
                with gr.Row():
                    strength = gr.Slider(0, 2, 1, step=0.05, label="Strength", min_width=170,
                                         info="0 is nobody, 1 as trained")  # fmt: skip
                    guidance = gr.Slider(0, 12, usual, step=0.5, label="Subject guidance",
                                         min_width=170, info="more: more of the person")  # fmt: skip
                with gr.Row():
                    seed = gr.Number(0, label="Seed", precision=0, min_width=170)
                    count = gr.Slider(1, AT_ONCE, 4, step=1, label="How many", min_width=170)
                draw = gr.Button("Draw", variant="primary", elem_id="draw")
                drawing = gr.HTML(elem_id="drawing", elem_classes="hd-said")
                gallery = gr.Gallery(
                    label="Pictures", columns=4, object_fit="contain", height="auto", elem_id="gallery",
                    interactive=False, allow_preview=False, buttons=[],
                )  # fmt: skip
                about = gr.HTML(elem_id="about", elem_classes="hd-said")
                with gr.Row():
                    more = gr.Button("More like this", elem_id="more", min_width=130)
                    packed = gr.DownloadButton("All pictures (zip)", interactive=False, elem_id="zip", min_width=130)
        with gr.Column(elem_classes="hd-card"):
            gr.HTML("<h2><span>3</span> The shelf</h2><p>Everybody you personalised, until you leave or reload the "
                    "page. Adapters add like vectors: people can be mixed, and changed.</p>")  # fmt: skip
            shelf = gr.HTML(show.shelf([]), elem_id="shelf")
            with gr.Row(elem_classes="hd-columns"):
                with gr.Column(min_width=280):
                    gr.HTML("<h3>Mix</h3>")
                    one = gr.Dropdown(label="One", choices=[], elem_id="one")
                    other = gr.Dropdown(label="Another", choices=[], elem_id="other")
                    share = gr.Slider(0, 1, 0.5, step=0.05, label="How far from one to the other", elem_id="share")
                    mix = gr.Button("Mix", elem_id="mix")
                with gr.Column(min_width=280):
                    gr.HTML("<h3>Change</h3>")
                    changed = gr.Dropdown(label="Whom", choices=[], elem_id="changed")
                    shifts = [
                        gr.Slider(-FURTHEST, FURTHEST, 0, step=0.25, label=name.capitalize(), elem_id=f"shift-{name}",
                                  info=" ← 0 → ".join(ENDS[name]))
                        for name in ATTRIBUTES
                    ]  # fmt: skip
                    shift = gr.Button("Change", elem_id="change")
                with gr.Column(min_width=280):
                    gr.HTML("<h3>Take along</h3>")
                    taken = gr.Dropdown(label="Whose adapter", choices=[], elem_id="taken")
                    format = gr.Radio(label="For", value="kohya", elem_id="format", choices=[
                        ("ComfyUI, Forge, A1111 (kohya)", "kohya"), ("diffusers", "diffusers"), ("PEFT (zip)", "peft"),
                        ("hyperdb", "native"),
                    ])  # fmt: skip
                    file = gr.DownloadButton("Download the adapter", interactive=False, elem_id="file")
                    leave = gr.Button("Take off the shelf", elem_id="leave", size="sm")
            shelved = gr.HTML(elem_id="shelved", elem_classes="hd-said")

        # --- what is shown again when something changed

        def of(updates: Any) -> Update:
            """Return an update of the face that is looked at."""
            several = len(updates.faces) > 1
            numbers = [(f"{i + 1}", i + 1) for i in range(len(updates.faces))]
            return {seen: show.photo(updates), work: "",
                    face: gr.update(choices=numbers, value=updates.face, visible=several)}  # fmt: skip

        def everybody(session: Session, name: str | None) -> Update:
            """Return updates of all that lists people; `name` is chosen."""
            names = list(session.people)
            chosen = name if name in names else names[-1] if names else None
            found: Update = {
                part: gr.update(choices=names, value=chosen) for part in (who, one, changed, taken)
            }
            rest = [n for n in names if n != chosen]
            found[who] = gr.update(choices=names, value=chosen, info="" if names else "Personalise somebody first.")
            found[other] = gr.update(choices=names, value=rest[-1] if rest else None)
            return {**found, shelf: show.shelf(session.people.values())}

        def pictures(session: Session) -> Update:
            """Return updates of the gallery and of what belongs to it."""
            shown = [(str(p.path), show.caption(p)) for p in session.pictures]
            return {gallery: gr.update(value=shown, selected_index=0), about: show.about(session.pictures[0]),
                    packed: gr.update(value=str(session.archive()), interactive=True)}  # fmt: skip

        # --- what is done

        def on_photo(session: Session, sent: Any, is_cut: bool) -> Iterator[Update]:
            path = sent.get("path") if isinstance(sent, dict) else None
            yield {photo: None, **of(session.take(path, not is_cut))}

        def on_example(number: int, session: Session) -> Iterator[Update]:
            yield of(session.example(EXAMPLES[number]))

        def on_face(session: Session, number: int) -> Iterator[Update]:
            yield of(session.choose(number))

        def on_personalise(session: Session, name: str, consent: bool) -> Iterator[Update]:
            for now in (done := Finished(session.personalise(name, consent is True))):
                yield {work: show.progress(now)}
            yield {work: show.made(done.result), called: "", **everybody(session, done.result.name)}

        def drawn(session: Session, asked: Any) -> Iterator[Update]:
            for now in (done := Finished(asked)):
                yield {drawing: show.progress(now)}
            yield {drawing: show.notes(done.result[1]), **pictures(session)}

        def on_draw(
            session: Session, name: str, text: str, factor: float, guided: float, first: int, number: int
        ) -> Iterator[Update]:
            asked = None if guided == usual else guided  # the base's own, which may be none
            yield from drawn(session, session.draw(Wish(name, text, factor, asked, first, number)))

        def on_more(session: Session) -> Iterator[Update]:
            yield from drawn(session, session.more())

        def on_pick(session: Session, event: Any) -> Iterator[Update]:
            yield {about: show.about(session.pick(event.index))}

        def edited(session: Session, asked: Any) -> Iterator[Update]:
            for now in (done := Finished(asked)):
                yield {shelved: show.progress(now)}
            yield {shelved: show.made(done.result), **everybody(session, done.result.name)}

        def on_mix(session: Session, a: str, b: str, how_far: float) -> Iterator[Update]:
            yield from edited(session, session.mix(a, b, how_far))

        def on_shift(session: Session, name: str, *values: float) -> Iterator[Update]:
            yield from edited(session, session.shift(name, dict(zip(ATTRIBUTES, values, strict=True))))

        def on_leave(session: Session, name: str) -> Iterator[Update]:
            session.forget(name)
            yield {shelved: show.notes([f"{name} is off the shelf."]), **everybody(session, None)}

        def on_file(session: Session, name: str | None, kind: str) -> Iterator[Update]:
            if name in session.people:
                yield {file: gr.update(value=str(session.export(str(name), kind)), interactive=True), shelved: ""}
            else:
                yield {file: gr.update(value=None, interactive=False)}

        def on_preset(_: Session, how: str, where: str) -> Iterator[Update]:
            if how in STYLE_PROMPTS and where in ("anywhere", *PLACE_PHRASES):
                yield {prompt: compose(how, "[V]", None if where == "anywhere" else where)}
            else:
                yield gr.skip()

        # --- the connections

        everyone = [who, one, other, changed, taken, shelf]

        def connect(event: Any, do: Callable[..., Iterator[Update]], given: list[Any], told: Any, outputs: list[Any],
                    name: str, picks: bool = False) -> None:  # fmt: skip
            """Call `do` with the visitor's session on an event; what a visitor can mend is said in the part `told`."""

            def run(session: Session | None, values: tuple[Any, ...], more: tuple[Any, ...]) -> Iterator[Update]:
                try:
                    assert session is not None
                    yield from do(session, *values, *more)
                except UserError as error:
                    yield {told: show.error(" ".join(str(error).split()))}
                except Left:
                    yield gr.skip()
                except Exception:
                    traceback.print_exc()
                    yield {told: show.error(BROKEN)}

            def plain(request: gr.Request, *values: Any) -> Iterator[Update]:
                yield from run(sessions.of(request.session_hash), values, ())

            def with_event(request: gr.Request, event: gr.SelectData, *values: Any) -> Iterator[Update]:
                yield from run(sessions.of(request.session_hash), values, (event,))

            event(
                with_event if picks else plain, given, list(dict.fromkeys([*outputs, told])), preprocess=False,
                show_progress="hidden", concurrency_limit=None, api_name=name, api_visibility="undocumented",
            )  # fmt: skip

        connect(photo.upload, on_photo, [photo, cut], seen, [photo, seen, face, work], "photo")
        for number, button in enumerate(examples):
            chosen = functools.partial(on_example, number)
            connect(button.click, chosen, [], seen, [seen, face, work], f"example_{number}")
        connect(face.input, on_face, [face], seen, [seen, face, work], "face")
        connect(personalise.click, on_personalise, [called, agreed], work, [work, called, *everyone], "personalise")
        for preset in (style, place):
            connect(preset.input, on_preset, [style, place], drawing, [prompt], "preset")
        wish = [who, prompt, strength, guidance, seed, count]
        results = [drawing, gallery, about, packed]
        connect(draw.click, on_draw, wish, drawing, results, "draw")
        connect(more.click, on_more, [], drawing, results, "more")
        connect(gallery.select, on_pick, [], drawing, [about], "pick", picks=True)
        connect(mix.click, on_mix, [one, other, share], shelved, everyone, "mix")
        connect(shift.click, on_shift, [changed, *shifts], shelved, everyone, "shift")
        connect(leave.click, on_leave, [taken], shelved, everyone, "leave")
        for choice in (taken, format):
            connect(choice.change, on_file, [taken, format], shelved, [file], "file")

        def gone(request: gr.Request) -> None:
            sessions.end(request.session_hash)

        page.unload(gone)
    return page


class Finished:
    """Goes through a generator and keeps what it returned as `result`."""

    def __init__(self, steps: Any) -> None:
        self.steps = steps
        self.result: Any = None

    def __iter__(self) -> Iterator[Any]:
        self.result = yield from self.steps


def theme() -> Any:
    """Return colours and sizes; the fonts are the visitor's own, so that nothing is fetched from elsewhere."""
    fonts = ["system-ui", "-apple-system", "Segoe UI", "sans-serif"]
    mono = ["ui-monospace", "monospace"]
    return gr.themes.Base(primary_hue="teal", secondary_hue="teal", neutral_hue="stone", font=fonts, font_mono=mono,
                          radius_size="md", text_size="md").set(
        body_background_fill="*neutral_100", body_background_fill_dark="*neutral_950",
        block_background_fill="white", block_background_fill_dark="*neutral_900",
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700", button_primary_text_color="white",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
    )  # fmt: skip


def serve(config: Config) -> None:
    """Load the models, serve the page until it is interrupted, and remove what visitors left."""
    try:
        socket.create_server((config.host, config.port)).close()  # before models are loaded, which may take minutes
    except OSError as error:
        where = f"host={config.host} port={config.port}"
        raise UserError(f"{where} cannot be served ({error}); choose another: port={config.port + 1}") from error
    models = [Personalizer(config) for _ in range(config.at_once)]
    for model in models:
        model.prior  # noqa: B018 (made now, not in the first visitor's time)
    root = Path(tempfile.mkdtemp(prefix="hyperdb-web-")).resolve()
    os.environ |= {"GRADIO_TEMP_DIR": str(root), "GRADIO_EXAMPLES_CACHE": str(root)}  # what gradio keeps and serves
    sessions, stop = Sessions(config, models, root), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    page = build(sessions)
    # a visitor who waits, or whose work runs, takes a thread of gradio's
    page.queue(max_size=None, default_concurrency_limit=None)
    try:
        _, local, shared = page.launch(
            server_name=config.host, server_port=config.port, share=config.share, prevent_thread_lock=True,
            quiet=True, ssr_mode=False, max_file_size=int(config.upload * 1e6), footer_links=[], run_history=False,
            state_session_capacity=2 * (config.waiting + config.at_once),  # its copies of what pages showed
            enable_monitoring=False, max_threads=config.waiting + config.at_once + 16, theme=theme(),
            css_paths=Path(__file__).with_name("page.css"), app_kwargs={"middleware": [Middleware(OwnFiles)]},
        )  # fmt: skip
        print(f"the page is at {local}" + (f" and {shared}" if shared else ""), flush=True)
        while not stop.wait(60):
            sessions.sweep()  # what visitors left is removed though nobody comes
    finally:
        page.close(verbose=False)
        sessions.close()
