"""Gradio pages that several units show; gradio is imported when a page is made."""

from pathlib import Path

# a picture of 28 pixels fills its place as a photograph does
CSS = ".picture img { width: 100%; height: 100%; object-fit: contain; } .told { font-size: 1.1em; }"


SENT = "The file is sent as it is: decoding and resizing are part of the exported graph."


def image_classifier(predict, title, examples=(), description=SENT):
    """A page for a picture, over `predict(bytes) -> {"probabilities": {label: p}, "version": v, "milliseconds": t}`.

    `predict` may be the model in this process or a call to an endpoint: the page is the same.  It is asked as soon as
    there is a picture.  `examples`: paths of pictures to try; the page is launched with `CSS`.
    """
    import gradio as gr

    def show(path):
        if path is None:
            return None, "Choose a picture."
        answer = predict(Path(path).read_bytes())
        return answer["probabilities"], f"Version **{answer['version']}** answered in {answer['milliseconds']:.1f} ms."

    picture = gr.Image(
        type="filepath", image_mode=None, label="picture (PNG, JPEG, GIF or BMP)", sources=["upload", "clipboard"],
        height=300, elem_classes="picture",
    )  # fmt: skip
    outputs = [gr.Label(num_top_classes=5, label="class"), gr.Markdown(elem_classes="told")]
    tries = [str(path) for path in examples] or None
    return gr.Interface(
        show, picture, outputs, title=title, description=description, examples=tries, cache_examples=False,
        flagging_mode="never", live=True, clear_btn=None,
    )  # fmt: skip
