"""What may identify or harm a person: e-mail addresses, phone numbers, keys and passwords of services. Torch-free.

Each is replaced by its name in brackets, so that a model learns that something stood there.
"""

from __future__ import annotations

import re

EMAIL, PHONE, KEY = "[EMAIL]", "[PHONE]", "[KEY]"

# RFC 5321's local part of at most 64 characters, as it is written in practice: dot-atoms, and a domain with a dot in it.
_EMAIL = re.compile(
    r"(?<![\w.+%-])[A-Za-z0-9_%+-]+(?:\.[A-Za-z0-9_%+-]+)*@(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z]{2,}(?![\w-])"
)

_KEYS = re.compile(
    "|".join(
        (
            r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----.*?-----END (?:[A-Z]+ )?PRIVATE KEY-----",
            r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b",  # Amazon
            r"\bgh[pousr]_[A-Za-z0-9]{36,}\b|\bgithub_pat_[A-Za-z0-9_]{50,}\b",
            r"\bglpat-[A-Za-z0-9_-]{20,}",  # GitLab
            r"\bhf_[A-Za-z0-9]{30,}\b",  # Hugging Face
            r"\bsk-(?:ant-|proj-|or-)?[A-Za-z0-9_-]{20,}",  # OpenAI, Anthropic, OpenRouter
            r"\bAIza[0-9A-Za-z_-]{35}",  # Google
            r"\bxox[abeoprs]-[0-9A-Za-z-]{10,}",  # Slack
            r"\b[rs]k_(?:live|test)_[0-9A-Za-z]{20,}",  # Stripe
            r"\bnpm_[A-Za-z0-9]{36}\b|\bpypi-[A-Za-z0-9_-]{50,}",
            r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}",  # a JSON web token
        )
    ),
    re.DOTALL,
)

_LONG = re.compile(r"[A-Za-z0-9_-]{13}|PRIVATE KEY")
"""Every pattern of a key has a part like this, and few texts do."""

_DIGITS = re.compile(r"\d(?:\D{0,3}\d){6}")
"""Seven digits near each other: a text without them holds no phone number, and the library need not look."""


def mask(text: str, *, email: bool = True, phone: bool = True, keys: bool = True, region: str | None = None) -> str:
    """`text` with what is asked for masked. A phone number must be a valid one (phonenumbers, Google's rules): written with
    its country code, or as in `region` (ISO 3166, such as US)."""
    if keys and _LONG.search(text):
        text = _KEYS.sub(KEY, text)
    if email and "@" in text:
        text = _EMAIL.sub(EMAIL, text)
    return _without_phones(text, region) if phone and _DIGITS.search(text) else text


def _without_phones(text: str, region: str | None) -> str:
    from phonenumbers import PhoneNumberMatcher

    parts, end = [], 0
    for match in PhoneNumberMatcher(text, region):
        parts += [text[end : match.start], PHONE]
        end = match.end
    return "".join([*parts, text[end:]])
