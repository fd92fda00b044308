"""Usage and parameters that the upstream reported, in the bodies of `/v1`."""

from __future__ import annotations

from imagegen.tasks.reply_details import ReplyDetails, Usage
from imagegen.web.openai.schemas import ImagesResponse, TokenDetails, TokenUsage


def add_details(body: ImagesResponse, details: ReplyDetails) -> None:
    """Add what the upstream reported with the images. `auto` is left out: the clients' types do not have it."""
    if usage := token_usage(details.usage or {}):
        body["usage"] = usage
    if details.size and details.size != "auto":
        body["size"] = details.size
    if details.quality and details.quality != "auto":
        body["quality"] = details.quality
    if details.background and details.background != "auto":
        body["background"] = details.background
    if details.output_format and details.output_format != "auto":
        body["output_format"] = details.output_format
    if details.revised_prompt and body["data"]:
        body["data"][0]["revised_prompt"] = details.revised_prompt


def token_usage(usage: Usage) -> TokenUsage | None:
    """Return the tokens as OpenAI's client reads them; None if the upstream counts something else."""
    input_tokens, output_tokens, total_tokens = (
        usage.get("input_tokens"),
        usage.get("output_tokens"),
        usage.get("total_tokens"),
    )
    if not (isinstance(input_tokens, int) and isinstance(output_tokens, int)):
        return None
    return {
        "input_tokens": input_tokens,
        "input_tokens_details": _token_details(usage.get("input_tokens_details"), text_tokens=input_tokens),
        "output_tokens": output_tokens,
        "output_tokens_details": _token_details(usage.get("output_tokens_details"), image_tokens=output_tokens),
        "total_tokens": total_tokens if isinstance(total_tokens, int) else input_tokens + output_tokens,
    }


def _token_details(details: object, *, text_tokens: int = 0, image_tokens: int = 0) -> TokenDetails:
    """Return the parts of a count; all of it is of one kind if the upstream reports no parts."""
    if not isinstance(details, dict):
        return {"text_tokens": text_tokens, "image_tokens": image_tokens}
    return {"text_tokens": details.get("text_tokens", 0), "image_tokens": details.get("image_tokens", 0)}
