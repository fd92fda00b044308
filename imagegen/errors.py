"""Errors of the service; each has its HTTP status and code, or whether a repeat can help.

ImagegenError
├── SettingsError          a start that can't succeed: exit code 2, one message with the remedy
├── ApiError               an answer of the HTTP API (docs/api.md): status, code, texts, headers
│   ├── InvalidJson, InvalidRequest, BadRequest, NotRetryable, AlreadyFinished, …
│   └── QueueUnavailable, ListRefused, QueueFull, Draining
├── UpstreamError          why a call to a provider, or the download of its image, failed
│   └── ImageRejected      a paid image that can't be used
└── DownloadFailed         a link that may work later
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from msgspec import Struct


class ImagegenError(Exception):
    """The root of all errors of this package."""


class SettingsError(ImagegenError):
    """The service can't start with these settings; the text names every fault and its remedy."""


class FieldError(Struct, frozen=True):
    """One fault of a request: the field as the client spelled it (`requests[2].width`) and the rule it breaks."""

    field: str
    message: str


class ApiError(ImagegenError):
    """An answer that is an error. `zh` and `en` are its texts, with `{}` fields filled from `values`."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    zh: ClassVar[str] = "服务器内部错误"
    en: ClassVar[str] = "Internal server error"
    retryable: ClassVar[bool] = False
    closes_connection: ClassVar[bool] = False
    """Whether the connection ends with the answer."""

    def __init__(
        self,
        *,
        details: Sequence[FieldError] = (),
        headers: Mapping[str, str] | None = None,
        **values: object,
    ) -> None:
        self.details = tuple(details)
        self.headers = dict(headers or {})
        self.values = values
        super().__init__(self.message("en"))

    def message(self, language: str) -> str:
        """Return the text for people, in `zh` or `en`."""
        return (self.zh if language == "zh" else self.en).format(**self.values)


class InvalidJson(ApiError):
    status, code = 400, "invalid_json"
    zh, en = "请求体不是有效的JSON：{reason}", "The request body is not valid JSON: {reason}"


class InvalidRequest(ApiError):
    status, code = 400, "invalid_request"
    zh, en = "请求参数无效", "The request is not valid"


class Unsupported(ApiError):
    status, code = 400, "unsupported"
    zh, en = (
        "没有任何上游再支持此接口，请使用/v1/images/edits",
        "No upstream has this route any more: use /v1/images/edits",
    )


class UploadNotFound(ApiError):
    status, code = 400, "upload_not_found"
    zh, en = "上传的图像不存在或已过期，请重新上传", "The upload does not exist or has expired: upload the image again"


class ImageTooLarge(ApiError):
    status, code = 400, "image_too_large"
    zh, en = (
        "图像像素过多：最多5000万像素，每边最多16384",
        "The image has more than 50 megapixels, or a side over 16,384",
    )


class PriceUnknown(ApiError):
    """A request that no budget can hold, since its price is unknown."""

    status, code = 400, "price_unknown"
    zh, en = (
        "已设置预算，但模型{model}的价格未知；请联系运营者设置UNKNOWN_PRICE_USD或MODELS_FILE",
        "There is a budget, and the price of {model} is unknown: the operator can set UNKNOWN_PRICE_USD or MODELS_FILE",
    )


class MaxCostPriceUnknown(PriceUnknown):
    """A submit with `maxCostUsd` of images with an unknown price."""

    zh, en = (
        "已设置maxCostUsd，但模型{model}的价格未知",
        "There is a maxCostUsd, and the price of {model} is unknown: leave it out, or choose another model",
    )


class BadRequest(ApiError):
    status, code, closes_connection = 400, "bad_request", True
    zh, en = "无法解析的HTTP请求", "The HTTP request could not be parsed"


class Unauthorized(ApiError):
    status, code = 401, "unauthorized"
    zh, en = "缺少或无效的密钥", "A valid key is needed"


class BudgetExceeded(ApiError):
    """The budget of the day, of the client's key or of all together, can't hold the request.

    Its value `resets_at` is also a field of the answer.
    """

    status, code = 402, "budget_exceeded"
    zh, en = "今日预算不足，将于{resets_at}重置", "The budget of the day does not suffice; it is reset at {resets_at}"


class MaxCostExceeded(ApiError):
    """The estimated cost of a submit is over its own `maxCostUsd`; nothing was submitted."""

    status, code = 402, "max_cost_exceeded"
    zh, en = (
        "预计费用{estimated}美元，超过maxCostUsd（{max_usd}美元）",
        "The images would cost about {estimated} USD, over maxCostUsd ({max_usd} USD)",
    )


class Forbidden(ApiError):
    status, code = 403, "forbidden"
    zh, en = "禁止访问", "Not allowed from here"


class CrossSiteRefused(ApiError):
    """A page of another site sent a request that changes something."""

    status, code = 403, "cross_site"
    zh = "拒绝来自其他网站页面的请求：请将其来源加入CORS_ORIGINS；若这是代理后的本服务页面，请设置PUBLIC_URL"
    en = (
        "Refused: a page of another site sent this. Add its origin to CORS_ORIGINS, or set PUBLIC_URL if the page "
        "is this service's own behind a proxy"
    )


class ForeignHost(CrossSiteRefused):
    """A name that is not this machine's was made to lead to loopback, by another site's DNS or by a proxy."""

    zh = (
        "HOST为回环地址，本服务只接受localhost的请求：若在代理之后，请将PUBLIC_URL设为客户端使用的地址，"
        "或设置TRUSTED_PROXY_HOPS=1并由代理发送X-Forwarded-For"
    )
    en = (
        "This service listens on loopback and serves only localhost. Behind a proxy set PUBLIC_URL to the address "
        "that clients use, or TRUSTED_PROXY_HOPS=1 if the proxy sends X-Forwarded-For"
    )


class NotAllowed(ApiError):
    """The API key does not allow this model or size; `details` names the field."""

    status, code = 403, "not_allowed"
    zh, en = "此密钥不允许该请求", "The API key does not allow this request"


class ApiKeyNotFound(ApiError):
    status, code = 404, "key_not_found"
    zh, en = "密钥不存在", "There is no API key of this name"


class RouteNotFound(ApiError):
    """A path without a route. Its value `near` is the route that was probably meant, if any."""

    status, code = 404, "route_not_found"
    zh, en = "接口不存在，所有接口见/docs", "No such route; /docs shows all of them"

    def message(self, language: str) -> str:
        text = super().message(language)
        if not (near := self.values.get("near")):
            return text
        return f"{text}。是否应为{near}？" if language == "zh" else f"{text}. Did you mean {near}?"


class TaskNotFound(ApiError):
    """The task of a route is unknown or expired. GET of the task itself has another body: `not_found_view`."""

    status, code = 404, "not_found"
    zh, en = "任务不存在或已过期", "The task does not exist or has expired"


class ImageNotFound(TaskNotFound):
    """The task exists, and has no image of this index, or not yet."""

    zh, en = "任务没有此序号的图像，或尚未生成", "The task has no image of this index, or not yet"


class MethodNotAllowed(ApiError):
    status, code = 405, "method_not_allowed"
    zh, en = "不支持的请求方法，此接口支持：{allowed}", "This route does not take this method, only {allowed}"


class BodyTimeout(ApiError):
    status, code, retryable, closes_connection = 408, "body_timeout", True, True
    zh, en = "读取请求体超时", "The request body did not arrive in time"


class AlreadyFinished(ApiError):
    status, code = 409, "already_finished"
    zh, en = "任务已结束，无法取消", "The task has already finished"


class NotRetryable(ApiError):
    status, code = 409, "not_retryable"
    zh, en = "只有失败或已取消的任务可以重试", "Only a failed or cancelled task can be retried"


class ApiKeyExists(ApiError):
    status, code = 409, "key_exists"
    zh, en = "同名密钥已存在", "There is an API key of this name already"


class ApiKeyIsFixed(ApiError):
    status, code = 409, "key_is_fixed"
    zh, en = "该密钥由API_KEYS设置，只能在那里更改", "This key is set in API_KEYS: change it there"


class ImageExpired(ApiError):
    status, code = 410, "image_expired"
    zh, en = "图像已过期", "The image has expired"


class BodyTooLarge(ApiError):
    status, code, closes_connection = 413, "body_too_large", True
    zh, en = "请求体过大，最多{limit}字节", "The request body is over {limit} bytes"


class UnsupportedMediaType(ApiError):
    status, code = 415, "unsupported_media_type"
    zh = "请使用Content-Type: application/json，UTF-8编码，且不压缩"
    en = "Send JSON with Content-Type: application/json, in UTF-8, not compressed"


class FormOrJsonNeeded(UnsupportedMediaType):
    zh = "请使用Content-Type: multipart/form-data的表单，或application/json的JSON"
    en = "Send a form with Content-Type: multipart/form-data, or JSON with application/json, in UTF-8"


class CompressedBody(UnsupportedMediaType):
    zh = "请求体不能压缩：请去掉Content-Encoding"
    en = "The body must not be compressed: send it without Content-Encoding"


class UnsupportedImage(ApiError):
    status, code = 415, "unsupported_image"
    zh, en = (
        "不支持的图像：必须是完整的PNG、JPEG或WebP文件",
        "The image can't be used: it must be a whole PNG, JPEG or WebP",
    )


class ExpectationFailed(ApiError):
    status, code, closes_connection = 417, "expectation_failed", True
    zh, en = "不支持的Expect头", "This Expect header is not supported"


class IdempotencyMismatch(ApiError):
    status, code = 422, "idempotency_mismatch"
    zh, en = "同一Idempotency-Key已用于不同的请求", "This Idempotency-Key was used with another body"


class RateLimited(ApiError):
    status, code, retryable = 429, "rate_limited", True
    zh, en = "请求频率过高，请稍后再试", "Too many requests, please try again later"


class TooManyOpenTasks(ApiError):
    status, code, retryable = 429, "too_many_open_tasks", True
    zh, en = "此密钥未完成的任务过多，请稍后再试", "The API key has too many unfinished tasks, please try again later"


class HeadersTooLarge(ApiError):
    status, code, closes_connection = 431, "headers_too_large", True
    zh, en = "请求头过大", "The request line or headers are too large"


class InternalError(ApiError):
    pass


class QueueUnavailable(ApiError):
    """Redis is not available: away, hung, full, read-only or over its quota."""

    status, code, retryable = 503, "queue_unavailable", True
    zh, en = "队列暂时不可用，请稍后再试", "The queue is not available right now, please try again"


class ListRefused(QueueUnavailable):
    """The user in REDIS_URL may not SCAN, which only searches through all tasks need: it is no outage."""

    retryable = False
    zh = "REDIS_URL 中的用户无权执行 SCAN，无法列出任务"
    en = "The user in REDIS_URL may not run SCAN, which a list of tasks needs"


class QueueFull(ApiError):
    status, code, retryable = 503, "queue_full", True
    zh, en = "队列已满，请稍后再试", "The queue is full, please try again later"


class TooManyConnections(ApiError):
    status, code, retryable, closes_connection = 503, "too_many_connections", True, True
    zh, en = "连接数已满，请稍后重试", "All connections are taken, try again later"


class Draining(ApiError):
    status, code, retryable, closes_connection = 503, "draining", True, True
    zh, en = "服务正在重启，请稍后再试", "The service is restarting, please try again"


class StoreUnavailable(ApiError):
    """The image store can't be read now, or holds this image where this instance can't read it."""

    status, code, retryable = 503, "store_unavailable", True
    zh, en = "图像存储暂时不可用", "The image store is not available right now"


class UpstreamError(ImagegenError):
    """A call to a provider without an image, in the words of docs/api.md.

    code: one of the task error codes, such as `upstream_timeout`.
    detail: for the client, at most 300 characters, no control characters, no secret.
    retryable: whether the same call may succeed later.
    ambiguous: sent, and no answer came, or only a gateway's; so it may have been paid for.
    unreached: the provider was certainly not reached, so nothing can have been paid.
    partly_sent: it was reached, but not the whole request was sent, so nothing can have been paid.
    charged: the upstream charges for it all the same, as for an image that its content checker withheld.
    usage: the tokens of a charged call, by which it is priced, in the words of `ReplyDetails.usage`; None if unknown.
    retry_after_s: seconds to wait, by the upstream.
    refused: fields that the upstream refused by name, as it spells them; see `refused_fields`.
    max_count: how many images a call may request, if the model refused their number.
    status: the upstream's HTTP status, None if there was no response.
    lasting: another call would most likely return the same useless response, as opposed to damage on the way.
    upstream_detail: the upstream's own words, for the log; `detail` where they are fit for the client.
    of_channel: the address that was called, or a gateway before it, refused any request.
    of_model: a refusal of the key or its account that may be one of this model or prompt alone.
    unexplained: a refusal such as a 403 without words about a key; it may be one of this prompt alone.
    refund_unsure: a job was accepted and then failed. Most relays refund it, and some may not.
    """

    def __init__(
        self,
        code: str,
        detail: str,
        *,
        retryable: bool = False,
        ambiguous: bool = False,
        unreached: bool = False,
        partly_sent: bool = False,
        charged: bool = False,
        usage: Mapping[str, Any] | None = None,
        retry_after_s: float | None = None,
        refused: tuple[str, ...] = (),
        max_count: int | None = None,
        status: int | None = None,
        lasting: bool = False,
        upstream_detail: str | None = None,
        of_channel: bool = False,
        of_model: bool = False,
        unexplained: bool = False,
        refund_unsure: bool = False,
    ) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail
        self.retryable = retryable
        self.ambiguous = ambiguous
        self.unreached = unreached
        self.partly_sent = partly_sent
        self.charged = charged
        self.usage = usage
        self.retry_after_s = retry_after_s
        self.refused = refused
        self.max_count = max_count
        self.status = status
        self.lasting = lasting
        self.upstream_detail = detail if upstream_detail is None else upstream_detail
        self.of_channel = of_channel
        self.of_model = of_model
        self.unexplained = unexplained
        self.refund_unsure = refund_unsure


class ImageRejected(UpstreamError):
    """A paid image that can't be used: its link is dead, or its bytes are no supported image.

    renewable: whether a fresh link may lead to a usable image: this one is dead, or leads to a page or damaged bytes.
    """

    def __init__(self, detail: str, *, lasting: bool, renewable: bool = False) -> None:
        super().__init__("upstream_bad_response", detail, lasting=lasting)
        self.renewable = renewable


class DownloadFailed(ImagegenError):
    """A link failed in a way that may pass; the image is paid for, so the same link is tried again later.

    retry_after_s: seconds that the host requires to wait.
    """

    def __init__(self, detail: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s


def forget_frames(error: BaseException) -> None:
    """Forget the frames of an error that is kept, and those of its causes.

    They hold what came of an image, and form a cycle with the frame that keeps the error.
    """
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__cause__ or cause.__context__
