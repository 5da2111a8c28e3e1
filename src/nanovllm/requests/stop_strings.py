"""Finds stop strings in a text that grows token by token. Loaded when a request has some.

A string may begin within one token and end within another, and a character may be spread over
several tokens. So tokens become text by `DecodeStream` of the tokenizers library, which holds back
incomplete characters, and the search begins so far before the new text that a string that ends in
it is found whole.

    text     ... wor|ld. En|d of              new text: "d of"; stop string: "End"
                       [--------]             searched
"""

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream


class StopStrings:
    """Takes the tokens of one answer. Raises nothing; a text that does not decode simply never stops.

    stops: in order of precedence, as in vLLM: where one step completes two, the first listed counts.
    include: whether the text keeps the string that was found. ignored_tokens: no string is found
    that ends within the text of the first so many tokens (min_tokens).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: tuple[str, ...],
        *,
        include: bool = False,
        ignored_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        self.text = ""
        self.found: str | None = None
        self._tokenizer, self._stops, self._include = tokenizer, stops, include
        self._ignored_tokens, self._num_tokens = ignored_tokens, 0
        self._stream = DecodeStream(skip_special_tokens=skip_special_tokens)

    def add(self, token_id: int) -> str | None:
        """Takes a token; the stop string that its text completes, or None. The text then ends there."""
        self._num_tokens += 1
        before = len(self.text)
        self.text += self._stream.step(self._tokenizer, token_id) or ""
        if self._num_tokens <= self._ignored_tokens or len(self.text) == before:
            return None
        for stop in self._stops:
            at = self.text.find(stop, max(0, before - len(stop) + 1))
            if at >= 0:
                self.text = self.text[: at + len(stop) if self._include else at]
                self.found = stop
                return stop
        return None

    @property
    def settled_text(self) -> str:
        """The text that no later token can take back: all but what may be the beginning of a stop
        string.
        """
        held = 0 if self._include else max(map(len, self._stops)) - 1
        return self.text[: max(0, len(self.text) - held)]
