r"""One notation for the many ways to write an answer: Unicode, LaTeX and plain text become one string.

The result is LaTeX in which relations, set operations and signs are single characters (the constants below), spacing
and sizing commands are gone, and brackets that LaTeX writes with a command are one character each. Nothing is dropped
that carries meaning: a character that is not known stays, and the reader then refuses the whole answer.
"""

import re
import unicodedata

LE, GE, NE, IN, APPROX, EQUIV = "\u2264", "\u2265", "\u2260", "\u2208", "\u2248", "\u2261"
CUP, CAP, MINUS_SET = "\u222a", "\u2229", "\u2216"
PM, MP, AND, OR = "\u00b1", "\u2213", "\u2227", "\u2228"
SET_OPEN, SET_CLOSE, ANGLE_OPEN, ANGLE_CLOSE = "\u2983", "\u2984", "\u27e8", "\u27e9"
DEGREE, DOTS, TIMES, DIVIDE, PERCENT = "\u00b0", "\u2026", "\u00d7", "\u00f7", "%"

TEXT_MACROS = (
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up|color\{\w+\})?|math(?:rm|bf|it|sf|tt|normal)|mbox|hbox|boldsymbol|bm|emph"
    r"|operatorname\*?|bf|rm|it)"
)

_FRACTIONS = {c: unicodedata.normalize("NFKC", c).split("\u2044") for c in map(chr, [0xBC, 0xBD, 0xBE])}
_FRACTIONS |= {c: unicodedata.normalize("NFKC", c).split("\u2044") for c in map(chr, range(0x2150, 0x215F))}
_SUPERSCRIPTS = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b\u207f", "0123456789+-n"
)
_SUBSCRIPTS = str.maketrans("\u2080\u2081\u2082\u2083\u2084\u2085\u2086\u2087\u2088\u2089", "0123456789")

GREEK = (
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa", "lambda", "mu", "nu"),
    *("xi", "omicron", "pi", "rho", "sigma", "tau", "upsilon", "phi", "chi", "psi", "omega"),
)
_GREEK_CHARACTERS = {
    unicodedata.lookup(f"GREEK {size} LETTER {'LAMDA' if name == 'lambda' else name.upper()}"): (
        name if size == "SMALL" else name.capitalize()
    )
    for name in GREEK
    for size in ("SMALL", "CAPITAL")
}

_CHARACTERS = {
    **dict.fromkeys("\u2212\u2010\u2011\u2012\u2013\ufe63", "-"),
    **dict.fromkeys(
        "\xa0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000\t\n\r", " "
    ),
    **dict.fromkeys("\u00b7\u22c5\u2219\u2022\u2217", r"\cdot "),
    **dict.fromkeys("\u33d1", r"\ln "),
    "\u2044": "/",
    "\u2215": "/",
    "\u3002": ".",
    "\u3001": ",",
    "\u221e": r"\infty ",
    "\u2205": r"\emptyset ",
    "\u00d8": r"\emptyset ",
    "\u211d": r"\mathbb{R}",
    "\u2124": r"\mathbb{Z}",
    "\u2115": r"\mathbb{N}",
    "\u211a": r"\mathbb{Q}",
    "\u2102": r"\mathbb{C}",
    "\u2223": "|",
    "\u2220": r"\angle ",
    "\u25b3": r"\triangle ",
    "\u230a": r"\lfloor ",
    "\u230b": r"\rfloor ",
    "\u2308": r"\lceil ",
    "\u2309": r"\rceil ",
    "\u2032": "'",
    "\u2019": "'",
    "\u00ba": DEGREE,
    "\u02da": DEGREE,
    "\u2a7d": LE,
    "\u2a7e": GE,
    "\u2254": "=",
    "\u2211": r"\sum ",
    "\u220f": r"\prod ",
    "\u22ef": DOTS,
    "\u00b5": r"\mu ",
    "\u03d5": r"\phi ",
    "\u03f5": r"\epsilon ",
    "\u2103": DEGREE + "C",
    "\u2329": ANGLE_OPEN,
    "\u232a": ANGLE_CLOSE,
}
_KEPT = set(
    LE + GE + NE + IN + APPROX + EQUIV + CUP + CAP + MINUS_SET + PM + MP + AND + OR + DEGREE + DOTS + TIMES + DIVIDE
)

# A comma or a thin or fixed space between groups of three digits leaves one number; a plain space does not.
_THOUSANDS_SPACE = re.compile(
    r"(?<=[0-9])(?:,?\\!|\{,\}|(?:\\[,;: ])+|[~\u00a0\u2009\u202f\u2007'])(?=[0-9]{3}(?![0-9]))"
)

_MULTIPLES = {"dozens?": "12", "hundred": "100", "thousand": "10^{3}", "million": "10^{6}"}
_MULTIPLES |= {"billion": "10^{9}", "trillion": "10^{12}"}


def _command(names: str) -> str:
    return rf"\\(?:{names})(?![A-Za-z])"


_COMMANDS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"<\|(?:im_end|eot_id|endoftext|end|end_of_text)\|>|</s>|<\uff5cend\u2581of\u2581sentence\uff5c>", ""),
        (r"\\[()\[\]]", " "),
        (r"\\n$", ""),
        (_command(r"left|right|[bB]ig+[lrm]?|displaystyle|textstyle|limits|nolimits|mathstrut|middle"), ""),
        (_command("tiny|small|normalsize|[lL]arge|LARGE|[hH]uge"), ""),
        (r"(?:\\\\\s*)+$", ""),  # a line break after the answer
        (r"\\(?:color|textcolor)\s*\{\w+\}", ""),
        (r"\\(?:phantom|hspace|vspace|label|tag)\*?\s*\{[^{}]*\}", ""),
        (r"\\[,;:!>]|(?<!\\)\\(?=\s)|~|" + _command("quad|qquad|thinspace|enspace"), " "),
        (r"\{\s*\\(bf|rm|it)\s+([^{}]*)\}", r"\\math\1{\2}"),
        (r"(?<![\^_A-Za-z])\{\s*([:=<>+-])\s*\}", r"\1"),  # braces that set the space around a sign
        *(
            (rf"(?<=[0-9])\s*((?:{TEXT_MACROS}\s*\{{)?)\s*{word}(?![A-Za-z])", rf"{TIMES}{multiple} \1")
            for word, multiple in _MULTIPLES.items()
        ),
        (r"\\(?:[dtc]|nice|s)frac(?![A-Za-z])", r"\\frac"),
        (_command("surd"), r"\\sqrt"),
        (rf"{TEXT_MACROS}\s*\{{\s*([,;:]?)\s*\}}", r"\1 "),
        (rf"(?:{TEXT_MACROS}\s*\{{\s*mod\s*\}}|(?<![A-Za-z\\])mod(?![A-Za-z]))", r"\\mod "),
        # n choose k as in the schools of several countries
        (r"(?<![A-Za-z\\])C_\{?([0-9]+)\}?\^\{?([0-9]+)\}?", r"\\binom{\1}{\2}"),
        (r"(?:\{\}|^)[_^]\{?([0-9]+)\}?\s*C_\{?([0-9]+)\}?", r"\\binom{\1}{\2}"),
        (r"(?<=[0-9)])\{\s*\}", ""),
        (r"(?<=[)\]])\s*U\s*(?=[(\[])", CUP),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\(?:lbrace|\{)", SET_OPEN),
        (r"\\(?:rbrace|\})", SET_CLOSE),
        (_command("langle"), ANGLE_OPEN),
        (_command("rangle"), ANGLE_CLOSE),
        (r"\\(?:lbrack|lparen)(?![A-Za-z])", "["),
        (r"\\rbrack(?![A-Za-z])", "]"),
        (_command("lvert|rvert|vert|mid"), "|"),
        (_command(r"ldots|cdots|dots|dotsc|dotsb|dotso") + r"|\.\s?\.\s?\.", DOTS),
        (r"\\not\s*=|" + _command("neq|ne") + "|!=|<>", NE),
        (_command("leqslant|leqq|leq|le") + "|<=|=<", LE),
        (_command("geqslant|geqq|geq|ge") + "|>=", GE),
        (_command("lt"), "<"),
        (_command("gt"), ">"),
        (_command("approx|approxeq|simeq"), APPROX),
        (_command("equiv"), EQUIV),
        (r"\\in(?![A-Za-z])", IN),
        (_command("cup|bigcup"), CUP),
        (_command("cap|bigcap"), CAP),
        (_command("setminus|smallsetminus|backslash"), MINUS_SET),
        (_command("pm") + r"|\+/-|\+-", PM),
        (_command("mp"), MP),
        (_command("lor|vee"), OR),
        (_command("land|wedge"), AND),
        (_command("cdot|times|ast") + r"|\u00d7", TIMES),
        (r"(?<=[0-9])\s*[xX]\s*(?=10\s*(?:\^|\*\*))", TIMES),
        (_command("div"), DIVIDE),
        (r"\\%", PERCENT),
        (r"\\#", "#"),
        (r"\*\*", "^"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|" + _command("degree|degrees|textdegree"), DEGREE),
        (rf"(?<=[0-9])\s*\^\s*(?:\{{\s*(?:{TEXT_MACROS}\s*\{{\s*o\s*\}}|o)\s*\}}|o(?![A-Za-z]))", DEGREE),
        (rf"\^\s*\{{?\s*{DEGREE}\s*\}}?", DEGREE),
        (rf"{DEGREE}\s*{TEXT_MACROS}\s*\{{\s*([CF])\s*\}}", DEGREE + r"\1"),
        (_command("varnothing"), r"\\emptyset "),
        (r"\\(?:Reals|reals|R)(?![A-Za-z])", r"\\mathbb{R}"),
        (r"\\mathbb\s*([A-Z])(?![A-Za-z])", r"\\mathbb{\1}"),
        (r"\\mathbf\{([RZNQC])\}", r"\\mathbb{\1}"),
        (r"\\var(?=epsilon|theta|phi|rho|sigma)", r"\\"),
        (r"\\arc(?=(?:sin|cos|tan|cot)h?(?![A-Za-z]))", r"\\arc"),
        (r"\\ensuremath(?![A-Za-z])", ""),
        # ]a, b[ is (a, b): where an opening bracket must stand, and where a closing one must
        (rf"(^[\s$]*|[={IN}{CUP}{CAP}{MINUS_SET}]\s*)\](?=[^\[\]]*,)", r"\1("),
        (rf"(?<=[\w\s}}])\[(?=[\s$.]*$|\s*[{CUP}{CAP}{MINUS_SET}])", ")"),
    )
)


def normalize(text: str) -> str:
    """Return ``text`` in the notation of this module; see there."""
    text = _THOUSANDS_SPACE.sub(",", text)
    text = "".join(map(_character, _scripts(text)))
    for pattern, replacement in _COMMANDS:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\s+", " ", text).strip()
    return text


def strip_text(text: str) -> str:
    """Return ``text`` with the macros for text and fonts replaced by their contents."""
    while (shorter := re.sub(TEXT_MACROS + r"\s*\{([^{}]*)\}", r"\1", text)) != text:
        text = shorter
    return re.sub(r"\s+", " ", re.sub(r"\\(?:bf|rm|it)(?![A-Za-z])", "", text)).strip()


def _scripts(text: str) -> str:
    """Rewrite Unicode fractions, superscripts, subscripts and roots, whose meaning NFKC would lose."""
    for character, (top, bottom) in _FRACTIONS.items():
        text = text.replace(character, f"\\frac{{{top}}}{{{bottom}}}")
    plain = "0123456789+-n"
    powers = "".join(chr(c) for c, _ in _SUPERSCRIPTS.items())
    text = re.sub(f"[{powers}]+", lambda m: "^{" + m[0].translate(_SUPERSCRIPTS) + "}", text)
    assert len(powers) == len(plain)
    text = re.sub("[\u2080-\u2089]+", lambda m: "_{" + m[0].translate(_SUBSCRIPTS) + "}", text)
    text = re.sub("\u221a\\s*([0-9.]+|[A-Za-z])", r"\\sqrt{\1}", text).replace("\u221a", "\\sqrt ")
    return re.sub("\u221b\\s*([0-9.]+|[A-Za-z])", r"\\sqrt[3]{\1}", text)


def _character(character: str) -> str:
    """Return the notation of one character; one that is not known stays as it is."""
    if character.isascii() and character not in "\t\n\r":
        return character
    if character in _CHARACTERS:
        return _CHARACTERS[character]
    if character in _GREEK_CHARACTERS:
        return f"\\{_GREEK_CHARACTERS[character]} "
    if character in _KEPT:
        return character
    if unicodedata.category(character) == "Cf":  # zero width: the reader of the answer does not see it
        return ""
    if (digit := unicodedata.decimal(character, None)) is not None:
        return str(digit)
    plain = unicodedata.normalize("NFKC", character)
    return plain if len(plain) == 1 else character
