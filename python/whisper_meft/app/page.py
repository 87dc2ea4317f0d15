"""The page: a recording goes in, an answer comes out. Of gradio's parts those that need no network."""

import logging
from typing import Any

from ..errors import UserError, one_line
from . import drawing
from .about import About
from .hearing import Listener, duration

logger = logging.getLogger(__name__)

KEPT_SECONDS = 600  # after which a recording is deleted; so long it can be played and cut
LOOKED_SECONDS = 60  # from one look for such to the next
WAITING = 20  # people whose recordings wait for those before them

CSS = f"""
.gradio-container {{ max-width: 46rem !important; margin: 0 auto !important; }}
footer {{ display: none !important; }}
{drawing.CSS}
"""


def theme() -> Any:
    """Colours, sizes and fonts; the font comes with gradio."""
    import gradio

    # Its files of weight 600 hold no Latin letters.
    font = gradio.themes.LocalFont("Source Sans Pro", weights=(400, 700))
    return gradio.themes.Default(
        primary_hue="blue", neutral_hue="slate", font=(font, "ui-sans-serif", "sans-serif")
    )


def _take_no_addresses(component: Any) -> None:
    """Where an address stands in the place of a file, gradio fetches what it leads to; this one does not."""
    import gradio

    move = component.async_move_resource_to_block_cache

    async def moved(place: Any) -> str | None:
        if "://" in str(place):
            raise gradio.Error("Only files that were sent are heard.", print_exception=False)
        return await move(place)

    component.async_move_resource_to_block_cache = moved


def build(listener: Listener, about: About, max_bytes: int, top: int) -> Any:
    """The page, a ``gradio.Blocks``.

    Args:
        listener: who hears what is sent. about: what is said of it.
        max_bytes: of a file; only told here, :func:`.serving.serve` holds to it.
        top: classes of which probabilities are shown.
    """
    import gradio

    def hear(path: str | None) -> str:
        if path is None:
            return ""
        try:
            return drawing.answer(listener.hear(path), top)
        except UserError as error:
            return drawing.failure(str(error))
        except Exception as error:
            logger.error("a recording could not be heard: %s", one_line(error))
            return drawing.failure("Something went wrong; the terminal in which the page runs says what.")

    limits = f"At most {duration(listener.max_seconds)} and {max_bytes // 2**20} MB"
    with gradio.Blocks(
        analytics_enabled=False, title=about.title, delete_cache=(LOOKED_SECONDS, KEPT_SECONDS)
    ) as page:
        gradio.HTML(drawing.heading(about.title, about.summary), apply_default_css=False)
        recording = gradio.Audio(
            sources=["upload", "microphone"],
            type="filepath",  # and no format: it is our reader that decodes, and ffmpeg is not needed
            label="Recording",
            buttons=[],
            elem_id="recording",
        )
        gradio.HTML(
            drawing.note(
                f"{limits}, in WAV, FLAC, OGG or MP3. It goes to the machine that serves this page and to no "
                f"other, and is deleted there within {duration(KEPT_SECONDS + LOOKED_SECONDS)}."
            ),
            apply_default_css=False,
        )
        answer = gradio.HTML(elem_id="answer", apply_default_css=False, min_height=40)
        if about.card is not None:
            with gradio.Accordion("About this model", open=False):
                gradio.Markdown(about.card)
        _take_no_addresses(recording)
        recording.change(
            hear, recording, answer, api_visibility="private", trigger_mode="always_last", concurrency_limit=1
        )
    page.queue(max_size=WAITING)
    return page
