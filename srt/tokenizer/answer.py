"""The answer to one request while it grows: what the client may see of the tokens that have come."""

from __future__ import annotations

from srt.messages import Delta, Emission, Finish, StopSpec
from srt.tokenizer.detokenize import Detokenizer
from srt.tokenizer.logprobs import Scores
from srt.tokenizer.stops import Stops, stops_of
from srt.tokenizer.thinking import ReasoningCount
from srt.tokenizer.vocabulary import Vocabulary


class Answer:
    """Turns the emissions of a request into deltas; the one with `finish` is the last.

    Without streaming there is one delta, the closing one; without stop texts too, the text is then decoded once.
    """

    __slots__ = (
        "_cached_tokens", "_detokenizer", "_image_tokens", "_images", "_keeps_stop", "_pending_ids", "_pending_text",
        "_prompt_tokens", "_reasoning", "_rid", "_scores", "_stops", "_stream", "_thinking", "closed",
    )  # fmt: skip

    def __init__(
        self,
        rid: str,
        vocabulary: Vocabulary,
        stop: StopSpec,
        *,
        stream: bool,
        skip_special_tokens: bool,
        prompt_tokens: int,
        images: int = 0,
        image_tokens: int = 0,
        scores: Scores | None = None,
        reasoning: ReasoningCount | None = None,
    ) -> None:
        """Raises: ServingError if `stop` has an expression that is none."""
        self._rid = rid
        self._stream = stream
        self._prompt_tokens = prompt_tokens
        self._images, self._image_tokens = images, image_tokens
        self._keeps_stop = stop.keep_text
        self._scores = scores
        self._reasoning = reasoning
        self._thinking = reasoning is not None and reasoning.is_open
        self._detokenizer = Detokenizer(vocabulary, skip_special_tokens=skip_special_tokens)
        self._stops = stops_of(stop)
        self._pending_ids: list[int] = []
        self._pending_text: list[str] = []
        self._cached_tokens = 0
        self.closed = False
        """The client has its ending; what still comes for this request is for nobody."""

    def advance(self, emission: Emission) -> Delta | None:
        """What to send to the client after this emission, if anything."""
        assert not self.closed
        self._cached_tokens = emission.cached_tokens or self._cached_tokens
        finish, before = emission.finish, len(self._pending_ids)
        if self._stops is None and not self._stream:
            self._pending_ids += emission.token_ids
            if finish is not None:
                self._pending_text.append(self._decode(self._pending_ids, finish))
        elif self._stops is None:
            self._pending_ids += emission.token_ids
            self._pending_text.append(self._decode(emission.token_ids, finish))
        else:
            finish = self._match(self._stops, emission)
        self.closed = finish is not None
        if self._reasoning is not None:
            self._reasoning.add(self._pending_ids[before:])
        if self._scores is not None:
            self._scores.add(emission, len(self._pending_ids) - before)
        if finish is None and not self._stream:
            return None
        return self._delta(emission, finish)

    def _delta(self, emission: Emission, finish: Finish | None) -> Delta:
        logprobs, prompt_logprobs = (None, None) if self._scores is None else self._scores.take()
        delta = Delta(
            rid=self._rid,
            text="".join(self._pending_text),
            token_ids=tuple(self._pending_ids),
            prompt_tokens=self._prompt_tokens,
            cached_tokens=self._cached_tokens,
            images=self._images,
            image_tokens=self._image_tokens,
            thinking=self._thinking,
            reasoning_tokens=0 if self._reasoning is None else self._reasoning.tokens,
            retractions=emission.retractions,
            finish=finish,
            timing=emission.timing,
            speculation=emission.speculation,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )
        self._pending_ids.clear()
        self._pending_text.clear()
        return delta

    def _shown(self, token_ids: list[int] | tuple[int, ...], finish: Finish | None) -> list[int] | tuple[int, ...]:
        """The ids whose text is shown: all but the stop id that ended the answer."""
        if finish is None or self._keeps_stop or not token_ids or finish.matched != token_ids[-1]:
            return token_ids
        return token_ids[:-1]

    def _decode(self, token_ids: list[int] | tuple[int, ...], finish: Finish | None) -> str:
        text = self._detokenizer.feed(self._shown(token_ids, finish))
        return text if finish is None else text + self._detokenizer.finish()

    def _match(self, stops: Stops, emission: Emission) -> Finish | None:
        """Feed an emission token by token; returns how the answer ends, by a stop text or by the emission."""
        token_ids, finish = emission.token_ids, emission.finish
        for count, token_id in enumerate(self._shown(token_ids, finish), start=1):
            self._show(stops, self._detokenizer.feed((token_id,)))
            if stops.matched is not None:
                self._pending_ids += token_ids[:count]
                return Finish("stop", stops.matched)
        self._pending_ids += token_ids
        if finish is not None:
            self._show(stops, self._detokenizer.finish())
            if stops.matched is not None:
                return Finish("stop", stops.matched)
            self._pending_text.append(stops.flush())
        return finish

    def _show(self, stops: Stops, text: str) -> None:
        if text:
            self._pending_text.append(stops.feed(text))
