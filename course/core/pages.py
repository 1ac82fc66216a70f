"""Gradio pages that several units show; gradio is imported when a page is made."""

from pathlib import Path


def image_classifier(predict, title, examples=()):
    """A page for a picture, over `predict(bytes) -> {"probabilities": {label: p}, "version": v, "milliseconds": t}`.

    `predict` may be the model in this process or a call to an endpoint: the page is the same.  `examples`: paths of
    pictures to try.
    """
    import gradio as gr

    def show(path):
        if path is None:
            return None, "Choose a picture first."
        answer = predict(Path(path).read_bytes())
        return answer["probabilities"], f"Version {answer['version']} answered in {answer['milliseconds']:.1f} ms."

    picture = gr.Image(type="filepath", label="picture (PNG, JPEG, GIF or BMP)")
    outputs = [gr.Label(num_top_classes=5, label="class"), gr.Markdown()]
    tries = [str(path) for path in examples] or None
    return gr.Interface(
        show, picture, outputs, title=title, examples=tries, cache_examples=False,
        flagging_mode="never",
    )  # fmt: skip
