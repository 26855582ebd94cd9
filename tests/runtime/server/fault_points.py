"""The list of the points at which faults happen (see `fault_injection`), by the scenario of `test_faults` that passes them."""

from __future__ import annotations

from tests.runtime.server.fault_injection import AFTER

# Where nothing can fail between the return of the call and the moment from which its result is given back: a name is bound.
NOTHING_FOLLOWS = {
    (point, AFTER)
    for point in (
        "server.answers: EventStream.__call__: asyncio.ensure_future()",
        "server.answers: _unless_gone: asyncio.ensure_future()",
        "server.answers: _unless_gone: asyncio.ensure_future() #2",
        "server.context: RequestContext.announce: arrivals.begin()",
        "server.context: RequestContext.settle: event_loop.call_soon()",
        "server.engine_swap: EngineSwap._start: asyncio.create_task()",
        "server.middleware: Guard._enter: self._service.access.enter()",
    )
}
# Points of tasks that only the end of the process cancels.
NEVER_CANCELLED = (
    "server.engine_swap: EngineSwap._replace",
    "server.engine_swap: EngineSwap._retire",
    "server.engine_swap: _close",
    "server.served_engine: ServedEngine.run_self_test",
)
PASSED_BY: dict[str, tuple[str, ...]] = {
    "chat": (
        "server.connections: Connection.on_message_complete: context_of(cast(Scope, self.scope)).announce()",
        "server.connections: Connection._answer: await app(scope, receive, send)",
        "server.connections: Connection._read: self._flow.hold()",
        "server.connections: Connection._expect: self.loop.call_later()",
        "server.middleware: Observer.__call__.observed_send: await send(message)",
        "server.middleware: Observer.__call__: hold()",
        "server.middleware: Observer.__call__: await self._run(exchange, scope, receive, observed_send)",
        "server.middleware: Observer._run: await self._app(scope, receive, send)",
        "server.middleware: Guard.__call__: await self._app(scope, bounded, bounded.watch(send))",
        "server.middleware: Guard.__call__: bounded.watch()",
        "server.middleware: Guard._enter: self._service.access.enter()",
        "server.middleware: _BoundedBody.__call__: await self._receive()",
        "server.middleware: _BoundedBody.watch.watched: await send(message)",
        "server.calls: read_body: await request.body()",
        "server.calls: read_call: await read_body(request)",
        "server.answers: answer: await _unless_gone(request.receive, waiting)",
        "server.answers: _gone: await receive()",
        "server.answers: _unless_gone: asyncio.ensure_future()",
        "server.answers: _unless_gone: asyncio.ensure_future() #2",
        "server.answers: _unless_gone: await asyncio.wait({task, watcher}, return_when=asyncio.FIRS",
        "server.context: RequestContext.announce: arrivals.begin()",
        "server.context: RequestContext.settle: event_loop.call_soon()",
        "server.routes.chat: create_chat_completion: await read_call(service, request, ChatBody)",
        "server.routes.chat: create_chat_completion: await answer(request, call, ChatFormat(call, f'chatcmpl-{cal",
        "serving.asynchronous: Channel.flush: self.event_loop.call_soon_threadsafe()",
        "serving.asynchronous: generate_async: handover.channel()",
        "serving.asynchronous: generate_async: Generation()",
        "serving.asynchronous: generate_async: engine.submit()",
        "serving.asynchronous: generate_async: await ended.get()",
        "serving.step_loop: StepLoop.submit: self._gate.enter()",
        "serving.step_loop: StepLoop._send: self._messages.put()",
        "serving.step_loop: StepLoop._step: scheduler.schedule()",
        "serving.step_loop: StepLoop._step: self.executor.step()",
        "serving.step_loop: StepLoop._advance: take()",
        "serving.step_loop: StepLoop._add: self.scheduler.add()",
        "serving.step_loop: StepLoop._add: self._deadlines.add()",
        "serving.scheduler: Scheduler.add: self.waiting.add()",
        "serving.scheduler: Scheduler._admit: self._place()",
        "serving.scheduler: Scheduler._match: self.prefixes.chain()",
        "serving.scheduler: Scheduler._take: self.waiting.take()",
        "serving.scheduler: Scheduler._place: self.prefixes.adopt()",
        "serving.scheduler: Scheduler._place: table.grow()",
        "serving.scheduler: Scheduler._place: self._take()",
        "serving.scheduler: Scheduler._place: self._free_slots.pop()",
        "serving.scheduler: Scheduler._place: insort()",
        "serving.scheduler: Scheduler._publish: self.prefixes.publish()",
        "serving.kv_blocks: BlockTable.grow: self._pool.take()",
        "serving.prefix_cache: _Siblings.add: insort()",
        "serving.prefix_cache: PrefixCache.adopt: pool.acquire()",
        "serving.prefix_cache: PrefixCache.adopt: table.grow()",
        "serving.prefix_cache: PrefixCache.adopt: self._announce()",
        "serving.generation: Generation.accept: self._take()",
        "serving.admission: Deadlines.add: heapq.heappush()",
    ),
    "chat in a stream": (
        "server.answers: EventStream.__call__: asyncio.ensure_future()",
        "server.answers: EventStream.__call__: await self._send_all(streams, send, watcher, writer_of(scope",
        "server.answers: EventStream._send_all: await streams.ready()",
        "server.answers: EventStream._send_all: await send({'type': 'http.response.start', 'status': self.st",
        "server.answers: EventStream._send_all: await send({'type': 'http.response.body', 'body': b''.join(c",
        "serving.async_streams: AsyncStreams.__init__: handover.channel()",
        "serving.async_streams: AsyncStreams.__init__: Generation()",
        "serving.async_streams: AsyncStreams.__init__: engine.submit()",
        "serving.async_streams: AsyncStreams.ready: asyncio.get_running_loop().create_future()",
        "serving.async_streams: AsyncStreams.ready: await self._reader",
    ),
    "two answers": (
        "server.routes.completions: create_completion: await read_call(service, request, CompletionBody)",
        "server.routes.completions: create_completion: await answer(request, call, CompletionFormat(call, f'cmpl-{c",
    ),
    "a grammar": (
        "server.calls: read_call: await service.aside(lambda: _make_call(served, schema, data,",
        "server.service: Service.aside: await asyncio.get_running_loop().run_in_executor(self._parse",
        "serving.generation: Generation.start: self._constraint.begin()",
    ),
    "cached in memory": (
        "serving.result_cache.cache: ResultCache._enter: self._flights.enter()",
        "serving.result_cache.cache: ResultCache._compute: self._flights.submit()",
        "serving.result_cache.single_flight: Flights.enter: Flight()",
    ),
    "cached in a file": ("serving.result_cache.cache: ResultCache._write.put: self._store.put()",),
    "not looked up": (
        "serving.result_cache.cache: ResultCache._enter: self._flights.lead_alone()",
        "serving.result_cache.single_flight: Flights.lead_alone: Flight()",
    ),
    "without chunks": ("server.connections: _without_chunks.send_plain: await send(message)",),
    "one prefix": (
        "serving.kv_blocks: BlockTable.share: self._pool.acquire()",
        "serving.prefix_cache: PrefixCache.adopt: table.share()",
    ),
    "tokenized": (
        "server.calls: read_aside: await read_body(request)",
        "server.routes.tokenize: tokenize: await read_aside(service, request, TokenizeBody, _tokenize)",
    ),
    "tokenized aside": ("server.calls: read_aside: await service.aside(lambda: function(served, validate(schema",),
    "detokenized": ("server.routes.tokenize: detokenize: await read_aside(service, request, DetokenizeBody, _detokeni",),
    "without a key": ("server.middleware: Guard.__call__: await error.response()(scope, receive, send)",),
    "an adapter": ("server.routes.adapters: load_adapter: await read_aside(service, request, LoadAdapterBody, _load, a",),
    "an adapter less": (
        "server.routes.adapters: unload_adapter: await read_aside(service, request, UnloadAdapterBody, _unloa",
    ),
    "another engine": (
        "server.served_engine: ServedEngine.run_self_test: await asyncio.to_thread(self.engine.self_test)",
        "server.served_engine: ServedEngine.run_self_test: await asyncio.to_thread(self._load_grammars)",
        "server.engine_swap: EngineSwap.replace: await asyncio.shield(replacing)",
        "server.engine_swap: EngineSwap._replace: await asyncio.to_thread(self._open, directory, load)",
        "server.engine_swap: EngineSwap._replace: await served.run_self_test()",
        "server.engine_swap: EngineSwap._retire: await asyncio.sleep(_TICK_S)",
        "server.engine_swap: EngineSwap._retire: await _close(served)",
        "server.engine_swap: EngineSwap._retire: await asyncio.sleep(_SETTLE_S)",
        "server.engine_swap: EngineSwap._start: asyncio.create_task()",
        "server.engine_swap: _close: await asyncio.to_thread(served.engine.close)",
        "server.routes.admin: replace_engine: await read_body(request)",
        "server.routes.admin: replace_engine: await service.swap.replace(directory)",
        "serving.step_loop: StepLoop.stop: self._messages.put()",
    ),
    "preempted": (
        "serving.scheduler: Scheduler._take_block: table.grow()",
        "serving.scheduler: Scheduler._preempt: self.waiting.add()",
        "serving.kv_blocks: BlockTable.replace: self._pool.acquire()",
        "serving.prefix_cache: PrefixCache._publish_full: table.replace()",
        "serving.prefix_cache: PrefixCache._add: self._pool.keep()",
        "serving.waiting: WaitingQueue.add: insort()",
    ),
}
PASSED = {point: scenario for scenario, points in PASSED_BY.items() for point in points}

# By the reason why no scenario is certain to pass them. Where one does, faults happen there, too.
NOT_PASSED_BECAUSE: dict[str, tuple[str, ...]] = {
    "Of clients that read slowly or send much at once: test_connections and test_pipelines.": (
        "server.connections: Connection.pause_writing: self.loop.call_later()",
        "server.connections: Connection._watch: self.loop.call_later()",
    ),
    "Of what is no HTTP request.": (
        "server.middleware: Observer.__call__: await self._app(scope, receive, send)",
        "server.middleware: Guard.__call__: await self._app(scope, receive, send)",
    ),
    "Passed after a fault only.": (
        "server.middleware: Observer._run: await failure.response()(scope, receive, send)",
        "server.engine_swap: EngineSwap._replace: await _close(served)",
    ),
    "Allocates nothing that is given back: `dataclasses.replace`.": (
        "server.calls: resolve: replace()",
        "server.formats: CompletionFormat.cut: replace()",
    ),
    "Passed where a client leaves, as it happens.": (
        "server.answers: _unless_gone: await task",
        "serving.step_loop: StepLoop.withdraw: self._messages.put()",
        "serving.step_loop: StepLoop.wake: self._messages.put()",
        "serving.result_cache.single_flight: Flights.withdraw: self._leaving.put()",
    ),
    "Of SIGHUP, not of a request.": (
        "server.engine_swap: EngineSwap.reload: await asyncio.to_thread(read_manifest, current.directory)",
        "server.engine_swap: EngineSwap.reload: await self.replace(current.directory)",
    ),
    "The second attempt after a fault at the first one.": (
        "serving.asynchronous: Channel.flush: self.event_loop.call_soon_threadsafe() #2",
        "serving.step_loop: StepLoop._resume: self._messages.put() #2",
    ),
    "Of `Engine.astream`, which the server does not use.": (
        "serving.asynchronous: _Inbox.get: asyncio.get_running_loop().create_future()",
        "serving.asynchronous: _Inbox.get: await self._reader",
        "serving.asynchronous: AsyncStream.__init__: handover.channel()",
        "serving.asynchronous: AsyncStream.__init__: Generation()",
        "serving.asynchronous: AsyncStream.__init__: engine.submit()",
        "serving.asynchronous: AsyncStream.__anext__: await self._next_piece()",
        "serving.asynchronous: AsyncStream.deltas: await self._next_piece()",
        "serving.asynchronous: AsyncStream._next_piece: await self._inbox.get()",
    ),
    "Of `Engine.stream`, which the server does not use.": (
        "serving.streams: Stream.__init__: Generation()",
        "serving.streams: Stream.__init__: engine.submit()",
    ),
    "Passed by the first request of an engine; a thread that does not start is an error of that request.": (
        "serving.step_loop: StepLoop._send: threading.Thread()",
    ),
    "Depends on when requests arrive: a prefix that others compute, guesses, answers that are joined.": (
        "serving.step_loop: StepLoop._handle: self._deadlines.add()",
        "serving.scheduler: Scheduler._admit: self._take()",
        "serving.scheduler: Scheduler._release_held: self.waiting.add()",
        "serving.scheduler: Scheduler._draft: table.grow()",
        "serving.result_cache.cache: ResultCache.submit: self._readers.submit()",
        "serving.result_cache.cache: ResultCache._enter: self._loop.watch()",
    ),
    "Depends on whether what a grammar allows next is known before the step ends; it has its faults where it is passed.": (
        "serving.step_loop: StepLoop._resume: self._messages.put()",
        "serving.generation: Generation.resume: self._take()",
    ),
    "Of an engine with telemetry of its own.": ("serving.step_loop: StepLoop._note_step: self._telemetry.step()",),
    "Of the thread of a cache that waits for a disk or a network, or of the engine's end.": (
        "serving.result_cache.cache: ResultCache._answer: self._background.put()",
        "serving.result_cache.cache: ResultCache._complete: self._background.put()",
        "serving.result_cache.cache: ResultCache._drop: self._background.put()",
        "serving.result_cache.background: Background.put: threading.Thread()",
        "serving.result_cache.background: Background.put: self._tasks.put()",
        "serving.result_cache.background: Background.flush: self.put()",
        "serving.result_cache.background: Background.close: self._tasks.put()",
    ),
}
NOT_PASSED = {point: reason for reason, points in NOT_PASSED_BECAUSE.items() for point in points}
