"""Model names: what clients may call a model, and what `/v1/models` says of each."""

from __future__ import annotations

from typing import Any

from maestro_backend.config import Config
from maestro_backend.scheduler import Scheduler

from ._errors import ApiError


class ModelTable:
    """Configured names and their served names."""

    def __init__(self, config: Config) -> None:
        self._names = {name: name for name in config.models}
        for name, model in config.models.items():
            self._names.update(dict.fromkeys(model.served_names, name))

    def resolve(self, name: str) -> str:
        """The configured model behind `name`.

        Raises:
            ApiError: 404, with the names there are.
        """
        if name not in self._names:
            known = ", ".join(sorted(self._names))
            message = f"the model {name!r} does not exist; this server has: {known}"
            raise ApiError(404, message, code="model_not_found", param="model")
        return self._names[name]

    def listing(self, scheduler: Scheduler) -> dict[str, Any]:
        """As OpenAI lists models, with residency and context length (tokens) beside."""
        workers = {w.model: w for w in scheduler.workers.values()}
        data = []
        for name, model in self._names.items():
            worker = workers.get(model)
            entry = {"id": name, "object": "model", "created": 0, "owned_by": "maestro"}
            if worker is not None:
                entry |= {
                    "residency": worker.residency.value,
                    "state": worker.state.value,
                    "max_model_len": worker.max_model_len or None,
                }
            data.append(entry)
        return {"object": "list", "data": data}
