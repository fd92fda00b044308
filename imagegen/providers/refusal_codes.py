"""Table of what image services mean by a refusal: the codes and the wording each of them uses. No I/O.

A status alone misleads: an account without credit is a 402 at Together, a 429 at OpenAI, a 400 at DashScope, a 403 at
fal. What lasts until the operator acts must not be retried, with any status.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import chain

from msgspec import Struct


class Meaning(Struct, frozen=True):
    """A task error code, and how services express it.

    codes: exact values, lower case, of an error's code, type, name, status or reason.
    wording: of its message; unless: wording of a refusal that passes.
    """

    code: str
    codes: frozenset[str]
    wording: re.Pattern[str]
    unless: re.Pattern[str] | None = None


def _words(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(alternatives), re.IGNORECASE)


BILLING = Meaning(
    "upstream_billing",
    frozenset(
        {
            "insufficient_quota",  # OpenAI, 429
            "billing_hard_limit_reached",  # OpenAI images, 400
            "billing_not_active",  # OpenAI, 429
            "exceeded_current_quota_error",  # Moonshot, 429
            "insufficient_balance",  # DeepInfra, Stability v1
            "insufficient_credits",  # BFL, OpenRouter
            "insufficientcredits",  # Runware
            "insufficient_user_quota",  # one-api and new-api, 403
            "pre_consume_token_quota_failed",  # new-api, 403
            "arrearage",  # DashScope, 400
            "prepaidbilloverdue",  # DashScope
            "postpaidbilloverdue",  # DashScope
            "commoditynotpurchased",  # DashScope
            "accountoverdueerror",  # Volcengine Ark, 403
            "billing_disabled",  # Google's reason, 403
            "payment_required",
            "quota_exhausted",
            "credits_exhausted",
            "30001",  # SiliconFlow, 403
            "1113",  # Zhipu, 429
            "minimax:1008",
        }
    ),
    _words(
        r"exceeded your current quota",  # OpenAI, Google
        r"billing hard limit",
        r"exhausted balance",  # fal, 403
        r"user is locked",  # fal, 403
        r"insufficient (?:account )?(?:balance|credits?|funds|quota)",  # Replicate, BFL
        r"balance (?:is|was) (?:insufficient|too low|exhausted)",  # SiliconFlow
        r"(?:not enough|no (?:remaining )?|out of|ran out of) credits?\b",
        r"credit (?:limit exceeded|balance is too low)",  # Together
        r"used all (?:of )?(?:your |its )?(?:available |included )?credits",  # xAI
        r"(?:monthly|daily) spend(?:ing)? (?:limit|cap)",  # xAI, Replicate
        r"account is not active\b",  # OpenAI
        r"exceeded your monthly included credits",  # Hugging Face
        r"prepayment credits are depleted",  # Google
        r"requires billing to be enabled",  # Google
        r"without a billing account",
        r"account is (?:in arrears|not in good standing|overdue)",  # DashScope
        r"failure to pay past invoices",  # Fireworks, 412
        r"(?:doesn['’]t|does not) have any credits",  # xAI, 403
        r"^key limit exceeded",  # OpenRouter, 403
        r"overdue (?:balance|payment|bill)",
        r"余额不足",
        r"额度不足",
        r"额度已用尽",
        r"已?欠费",
    ),
    unless=_words(r"per (?:second|minute|hour)", r"(?:retry|try again) in [0-9]", r"rate limit", r"too many requests"),
)
"""The account is out of credit. Google's 429 for a minute's quota has OpenAI's sentence, and a time to retry."""

MODEL_BILLING = Meaning(
    "upstream_billing",
    frozenset(
        {
            "allocationquota.freetieronly",  # DashScope, 403
            "setlimitexceeded",  # Volcengine Ark, 429
        }
    ),
    _words(
        r"free tier of the model has been exhausted",  # DashScope
        r"free allocated quota exceeded",  # DashScope, 429
        r"free_tier\w*, limit: 0\b",  # Google, 429: with a time to retry, but no time helps
        r"only accessible to billed users",  # Google's Imagen
    ),
)
"""The account has no credit, or no free calls, for this model; it may have some for others."""

AUTH = Meaning(
    "upstream_auth",
    frozenset(
        {
            "invalid_api_key",  # OpenAI, Together
            "invalidapikey",  # DashScope
            "api_key_invalid",  # Google's reason, 400
            "api_key_expired",
            "account_deactivated",  # OpenAI
            "authentication_error",
            "unauthenticated",  # Google
            "permission_denied",  # Google
            "unauthorized",  # Stability
            "minimax:1004",
            "minimax:2049",
        }
    ),
    _words(
        r"api key (?:not valid|expired|is invalid|was reported as leaked)",  # Google, 400
        r"(?:invalid|incorrect) api[ _-]?key",
        r"resource has been temporarily blocked",  # Azure
        r"account (?:has been |is )?(?:deactivated|suspended|disabled)",
        r"无效的令牌",  # one-api
        r"令牌.{0,6}(?:已过期|状态不可用|已禁用)",  # one-api
        r"IP ?(?:不在|is not (?:in|on) ).{0,16}(?:允许|白名单|allow|white)",  # new-api
    ),
)
"""The key, or the account behind it, is not accepted."""

CONTENT = Meaning(
    "content_policy",
    frozenset(
        {
            "content_policy_violation",  # OpenAI, fal, BFL behind Together
            "moderation_blocked",  # OpenAI GPT image
            "content_filter",  # Azure
            "contentfilter",  # Azure
            "content_filtered",  # Stability
            "content_moderation",  # Stability, 403
            "responsibleaipolicyviolation",  # Azure's inner error
            "datainspectionfailed",  # DashScope
            "data_inspection_failed",
            "ipinfringementsuspect",  # DashScope
            "inputtextsensitivecontentdetected",  # Volcengine Ark
            "inputimagesensitivecontentdetected",
            "outputimagesensitivecontentdetected",
            "sensitivecontentdetected",
            "image_safety",  # Google
            "public_error_unsafe_generation",  # Google's reason, 400
            "image_prohibited_content",
            "prohibited_content",
            "request moderated",  # BFL
            "content moderated",
            "prompt_blocked",  # new-api
            "sensitive_words_detected",  # new-api
            "1301",  # Zhipu
            "minimax:1026",
            "minimax:1027",
        }
    ),
    _words(
        r"nsfw",
        r"content[ _-]?policy",
        r"(?:violates?|violating) (?:our|the) polic(?:y|ies)",  # Google's Imagen
        r"(?:input|prompt|request) was flagged",  # OpenRouter, 403
        r"content management policy",  # Azure
        r"content (?:safety )?filter",
        r"content checker",  # fal
        r"content moderation",  # xAI
        r"(?:request|content) moderated",  # BFL
        r"(?:by|failed|our) (?:the |our )?moderation",
        r"moderation[ _](?:blocked|system|filter|check)",
        r"safety (?:system|filter|policy|guidelines|reasons)",
        r"unsafe (?:content|image|prompt)",
        r"inappropriate content",  # DashScope
        r"sensitive (?:content|information|words?)",  # Volcengine, MiniMax
        r"prohibited content",
        r"usage (?:guidelines|polic(?:y|ies))",  # xAI, OpenAI
        r"responsible ai",  # Google, Azure
        r"flagged (?:as|by|for)",
        r"敏感",
        r"违规",
        r"内容安全",
        r"不安全",
    ),
)
"""The prompt or the image was refused for what it shows."""

_NOT = r"(?:(?:does|do|is|are|was|were|has|have|can|could)(?:n['’]t|not| not| no longer)|not|no longer)"
_MODEL_WORDS = (
    r"(?:[a-z]{0,20}error: ?)?(?:(?:the|this|your|requested|specified|provided|selected|publisher|image) )*models?"
    r"(?: (?:id|name|version|identifier|or endpoint))?(?: ?[:=]?[ ]?(?:[\w./:@-]{2,120}|…))?"
)
_ACCOUNT_WORDS = (
    r"(?:\w+ )?(?:plan|subscription|tier|account|organi[sz]ation|project|workspace|team|group|(?:api )?key)"
)
_NOT_ONLY_WITH = r"(?! (?:with|when|if|together|in combination|for (?!your|image|this (?:account|api|endpoint|key))))"
"""After these words a refusal is about a field of the request."""

NO_MODEL = Meaning(
    "model_not_available",
    frozenset(
        {
            "model_not_available",  # Together
            "model_not_found",  # OpenAI, relays
            "modelnotfound",  # DashScope
            "modelnotsupported",
            "model_not_supported",
            "unsupported_model",
            "unknown_model",  # Azure
            "invalid_model",
            "model_deprecated",
            "deploymentnotfound",  # Azure
            "operationnotsupported",  # Azure
            "invalidendpointormodel",  # Volcengine Ark
            "model_price_error",  # new-api: the relay's operator has set no price
        }
    ),
    _words(
        rf"^{_MODEL_WORDS} {_NOT} (?:\w+ )?(?:exist|found|supported|available|enabled|activated|deployed|allowed"
        rf"|accessible|configured|permitted|served|valid)\b{_NOT_ONLY_WITH}",
        rf"^{_MODEL_WORDS} (?:(?:is|are|was|has|have|been|currently|now) )*(?:deprecated|retired|removed|disabled"
        r"|decommissioned|discontinued|unavailable|offline|invalid)\b",
        r"^(?:\w{0,20}error: ?)?(?:unknown|unsupported|unrecognized|invalid|no such) model(?: id| name| identifier)?"
        r"(?:$|[ :.=] ?[^ ]*$)",
        r"^invocation of model",  # Bedrock
        r"^no (?:available |allowed )?(?:channels?|providers?|endpoints?|deployments?)\b",  # relays, OpenRouter
        r"does not work with the specified model",  # Azure
        r"model is not supported for image generation",
        r"unable to access (?:non-serverless )?model",  # Together
        r"not found for api version",  # Google
        r"not a valid model id",  # OpenRouter
        r"^current user api does not support",  # DashScope, 403: the model takes only other calls
        r"^model: (?:input should be|unexpected value|value is not a valid)",  # FastAPI
        r"ratio or price not set",  # new-api
        r"倍率或价格未配置",
        r"(?:无|没有)可用的?(?:渠道|通道)",  # one-api
        r"模型.{0,40}(?:不存在|未找到|已下线|已停用|已弃用|不可用|未启用)",
        r"不支持的?模型",
    ),
)
"""The service has no such model, or not any more. The words begin a message: later they may be about a field."""

ACCOUNT = Meaning(
    "upstream_auth",
    frozenset(
        {
            "modelnotopen",  # Volcengine Ark
            "model.accessdenied",  # DashScope
            "accessdenied.unpurchased",  # DashScope
            "unsupported_country_region_territory",  # OpenAI
            "service_disabled",  # Google's reason
            "30011",  # SiliconFlow: only with a verified name
        }
    ),
    _words(
        r"organi[sz]ation must be verified",  # OpenAI
        r"must (?:be verified|verify your)\b",
        r"real-name (?:authentication|verification)",  # SiliconFlow
        r"(?:country|region|territory|location) (?:is )?not (?:supported|available|allowed)",  # OpenAI, Google
        r"not (?:supported|available|allowed|offered) in (?:your|this) (?:country|region|location|territory)",
        rf"\byour {_ACCOUNT_WORDS} {_NOT} (?:\w+ ){{0,3}}"
        r"(?:support|include|allow|activate|enable|access|permit|permission|cover|entitle|eligible)",
        r"upgrade your (?:plan|account|subscription|tier)",
        rf"not (?:enabled|available|activated|included) (?:for|on|in|under|with) (?:your|this) {_ACCOUNT_WORDS}",
        r"^project is not allowed to use",  # Google
        r"accept the (?:terms|licen[cs]e|agreement)",
        r"don['’]t have access to the model",  # Bedrock
        r"^(?:model )?access (?:to (?:the )?model )?(?:is )?denied",  # DashScope
        r"实名",
        r"无权(?:访问|使用)",  # one-api
        r"没有权限",
        r"未开通",
        r"地区.{0,6}(?:不支持|限制)",
    ),
)
"""The account may not use the model: its plan, its region or a missing verification; another account may."""

QUOTA = Meaning(
    "upstream_billing",
    frozenset(),
    _words(r"quota (?:has been |is |was )?(?:exceeded|exhausted|used up)"),
    unless=BILLING.unless,
)
"""Relays' wording for an account without credit. Under a status that passes, such as 429, it is a rate limit's."""

_MOST_READ_CHARS = 1_000
_UNKNOWN_FIELD = re.compile(r"(?:unknown|unrecognized|unexpected|extra|unsupported|missing) |required", re.IGNORECASE)
_QUOTED = re.compile(r"`[^`]*`|\"[^\"]*\"|(?<!\w)'[^']*'(?!\w)|[“「][^”」]*[”」]")


_LARGE = _words(r"^request too large for .{1,200}: limit [0-9]+, requested [0-9]+")
TOO_LARGE = Meaning("upstream_invalid_request", frozenset(), _LARGE)
"""OpenAI's 429 for more than a minute's quota in one request: https://learn.microsoft.com/answers/questions/2263211"""

_UNAUTHORIZED = 401
_OF_MODEL = re.compile(r"model|prompt|content|image|picture|text|input|模型|内容|提示|图", re.IGNORECASE)
_SATURATED = re.compile(r"负载已饱和")
"""Text of one-api and new-api for each 429 of a channel behind them, whatever its code: another channel may take the
next call. https://github.com/labring/FastGPT/issues/1056"""

_LIMIT_STATUSES = frozenset({400, 403, 420})
"""Statuses but 429 with which some services refuse by a rate limit: AWS and relays with 400, Google with 403. Relays do
so with a 5xx too."""

_LIMIT_CODES = frozenset(
    {
        "429",  # relays
        "rate_limit_exceeded",  # OpenAI
        "rate_limit_error",
        "rate_limited",
        "model_rate_limit",  # Together
        "ratelimitexceeded",  # Google, 403
        "userratelimitexceeded",  # Google, 403: https://developers.google.com/workspace/drive/api/guides/handle-errors
        "too_many_requests",
        "toomanyrequests",
        "throttling",  # DashScope
        "throttlingexception",  # AWS, 400: https://docs.aws.amazon.com/general/latest/gr/api-retries.html
        "requestlimitexceeded",
        "minimax:1002",  # 200: https://platform.minimax.io/docs/api-reference/errorcode
        "minimax:1039",
    }
)
_LIMIT_WORDING = re.compile(
    r"(?:\w+ ){0,2}(?:error|status|http)(?: code)?[:=]? ?\(?429\b"
    r"|(?:error: ?)?(?:(?:\w+ ){0,3}rate[ -]?limit (?:is |was )?(?:exceeded|reached|hit)|rate[ -]?limited"
    r"|too many (?:concurrent )?requests|请求过于频繁|quota exceeded.{0,200}\bper (?:second|minute|hour))",
    re.IGNORECASE,
)
"""Begin of a message. Later in it the words may be the client's own, which a refusal quotes."""


def names_rate_limit(status: int, codes: Collection[str], message: str) -> bool:
    """Return whether a refusal with another status than 429 means a rate limit, which passes.

    codes: lower case.
    """
    if status not in _LIMIT_STATUSES and not (200 <= status < 300 or status >= 500):
        return False
    if any(code.split(".")[0] in _LIMIT_CODES for code in codes):
        return True
    return status == 420 or _LIMIT_WORDING.match(message.lstrip()) is not None


def lasting(status: int, codes: Collection[str], message: str, param: str = "") -> str | None:
    """Return the task error code of a refusal that no repeat fixes, by its codes and wording; None otherwise.

    codes: lower case. param: the field that the refusal names; it is about that field then, not about the account.
    A failing or limiting status (429, 5xx) is only overruled by what cannot be meant otherwise.
    """
    meaning = _meaning(status, codes, message, param)
    return meaning.code if meaning else None


def is_of_model(status: int, codes: Collection[str], message: str, param: str = "") -> bool:
    """Return whether a refusal of the key or its account may be one of the model or of the prompt alone.

    Such a key may be good for other calls. A 401 is about the key.
    """
    meaning = _meaning(status, codes, message, param)
    if meaning is MODEL_BILLING:
        return True
    of_auth = meaning in (None, AUTH, ACCOUNT) and status != _UNAUTHORIZED
    return of_auth and _OF_MODEL.search(message[:_MOST_READ_CHARS]) is not None


def is_unexplained(status: int, codes: Collection[str], message: str, param: str = "") -> bool:
    """Return whether only the status of a refusal shows what it means, and it is no 401."""
    return status != _UNAUTHORIZED and _meaning(status, codes, message, param) is None


def _meaning(status: int, codes: Collection[str], message: str, param: str) -> Meaning | None:
    passing = status in (408, 425, 429) or status >= 500
    if passing and _SATURATED.search(message):
        return None
    for meaning in (MODEL_BILLING, BILLING, AUTH, TOO_LARGE, CONTENT):
        if _names(meaning, codes):
            return meaning
        if (meaning is CONTENT and passing) or not meaning.wording.search(message):
            continue
        if meaning.unless is None or not (passing or status in _LIMIT_STATUSES) or not meaning.unless.search(message):
            return meaning
    return None if passing else _of_account(codes, message, param)


def _of_account(codes: Collection[str], message: str, param: str) -> Meaning | None:
    """Return the meaning of a refusal of the model, or of its use by the account, and not of the request; or None.

    What the message quotes may be the client's own words.
    """
    text = _QUOTED.sub("…", message[:_MOST_READ_CHARS]).lstrip()
    is_about_model = param.lower() == "model"
    for meaning in (NO_MODEL, ACCOUNT, QUOTA):
        is_meant = (not param or is_about_model) and meaning.wording.search(text)
        if _names(meaning, codes) or (is_meant and not (meaning.unless and meaning.unless.search(text))):
            return meaning
    return NO_MODEL if is_about_model and not _UNKNOWN_FIELD.search(text) else None


def _names(meaning: Meaning, codes: Collection[str]) -> bool:
    return any(code in meaning.codes for code in chain(codes, (code.split(".")[0] for code in codes)))


_REFUSAL_TEXT = _words(
    r"\b(?:can(?:no|['’])?t|can not|could not|unable to|not able to|won['’]?t|must decline to) (?:\w+ ){0,4}?"
    r"(?:generate|generating|create|creating|make|making|produce|producing|draw|depict|provide|assist|help|complete"
    r"|fulfill?|edit|process|do that)",
    r"\b(?:against|violat\w+|goes against|prohibited by|not permitted by) (?:my|our|the|google|openai)\b",
    r"\b(?:my|our) (?:safety |content )?(?:guidelines|polic(?:y|ies))",
    r"(?:无法|不能|不可以|拒绝)(?:为您|为你|帮您|帮你)?(?:生成|创建|绘制|提供|协助|完成|满足)",
)
"""Wording of a model that writes why it makes no image, as Gemini and models behind a chat do."""


def is_refusal_text(text: str) -> bool:
    """Return whether a text in place of an image is a refusal of the prompt."""
    return bool(CONTENT.wording.search(text) or _REFUSAL_TEXT.search(text))


_COUNT = r"(?:n|num_images(?:_per_prompt)?|num_outputs|batch[ _]size|sample_?count|number[ _]of[ _](?:images|outputs))"
_ABOUT_COUNT = re.compile(
    rf"(?:^|[\s'\"`(\[{{.,]){_COUNT}(?:$|[\s'\"`)\]}}:=<>,.])"
    r"|(?:one|1|single) image (?:per|at a time|only)|multiple images|too many images|more than one image",
    re.IGNORECASE,
)
_HIGHEST = re.compile(
    r"(?:<=|≤|(?:between|from) 1 (?:and|to)|\b1 ?(?:-|–|\.\.)|less than or equal to|at most|no more than|up to"
    r"|max(?:imum)?(?: of| is|:)?) ?([0-9]{1,3})\b",
    re.IGNORECASE,
)


def highest_count(parameter: str, message: str) -> int | None:
    """Return how many images a call may request, if a refusal is about their number; None if it is about another thing.

    parameter: as named by the error, if any. A refusal that names no number is taken for one image a call.
    """
    if not re.fullmatch(_COUNT, parameter, re.IGNORECASE) and not _ABOUT_COUNT.search(message):
        return None
    highest = _HIGHEST.search(message)
    return max(int(highest[1]), 1) if highest else 1
