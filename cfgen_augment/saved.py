"""What a fitted model keeps of itself: on disk, in pickles, and from device to device."""

from __future__ import annotations

import inspect
import os
from dataclasses import asdict
from numbers import Integral
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cfgen_augment import checkpoint
from cfgen_augment.attributes import Attributes
from cfgen_augment.modalities import Modality, by_name, each
from cfgen_augment.network import Network
from cfgen_augment.parameters import RandomState
from cfgen_augment.size_factors import SizeFactors
from cfgen_augment.training import History, resolve_device


class SavedModel:
    """Saving, loading, pickling and moving; `CFGen` adds how to fit and to generate.

    A subclass takes its parameters as keywords, stores them under their names, and lays out its
    networks from them and from the fitted attributes.
    """

    random_state: RandomState
    attributes_: Attributes
    modalities_: tuple[Modality, ...]
    feature_names_: NDArray | dict[str, NDArray] | None
    dtype_: np.dtype | dict[str, np.dtype]
    size_factor_: SizeFactors
    label_counts_: NDArray[np.int64]
    history_: dict[str, History]
    network_: Network

    def _layout(self) -> Network:
        """The networks on the ``meta`` device."""
        raise TypeError(f"{type(self).__name__} does not say how its networks are laid out")

    def __repr__(self) -> str:
        """Parameters that differ from their defaults, as scikit-learn shows estimators."""
        defaults = inspect.signature(type(self).__init__).parameters
        changed = {
            name: value
            for name, value in vars(self).items()
            if name in defaults
            and value is not defaults[name].default
            and value != defaults[name].default
        }
        return f"CFGen({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    @property
    def n_features_in_(self) -> int:
        """Number of features, of all modalities together."""
        return sum(modality.n_features for modality in self.modalities_)

    @property
    def device_(self) -> torch.device:
        """Where the fitted model is."""
        return self.network_.device

    def save(self, directory: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the fitted model to a directory: safetensors weights and a JSON configuration.

        Parameters
        ----------
        directory
            Where to; made if absent.
        overwrite
            Replace a saved model that is already there.

        Returns
        -------
        Path
            The directory.

        Raises
        ------
        RuntimeError
            If the model is not fitted.
        FileExistsError
            If the directory is not empty and `overwrite` is false, or holds anything but a saved
            model.
        """
        self._check_fitted()
        names = None
        if self.feature_names_ is not None:
            names = each(self.modalities_, self.feature_names_, "feature_names_")
        fitted = {
            "attributes": self.attributes_.to_json(),
            "modalities": [asdict(modality) for modality in self.modalities_],
            "feature_names": None if names is None else [own.tolist() for own in names],
            "dtypes": [dtype.str for dtype in each(self.modalities_, self.dtype_, "dtype_")],
            "size_factor": self.size_factor_.to_json(),
            "label_counts": self.label_counts_.tolist(),
            "history": {name: asdict(history) for name, history in self.history_.items()},
        }
        config = {"parameters": self._parameters(), "fitted": fitted}
        return checkpoint.save(
            Path(directory), self.network_.state_dict(), config, overwrite=overwrite
        )

    @classmethod
    def load(cls, directory: str | os.PathLike[str], *, device: str = "auto") -> Self:
        """Read a model written by `save`; never runs code from the file.

        Parameters
        ----------
        directory
            Where `save` wrote to.
        device
            Where to put the model, wherever it was trained.

        Returns
        -------
        CFGen
            The fitted model.

        Raises
        ------
        FileNotFoundError
            If there is no saved model in the directory.
        ValueError
            If a file is truncated, altered, or of another version, or the device is absent.
        """
        resolved = resolve_device(device)
        tensors, config = checkpoint.load(Path(directory))
        try:
            model = cls(**config["parameters"], device=device)  # type: ignore[call-arg]
            model._restore(config["fitted"], tensors)
        except (KeyError, TypeError, RuntimeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"{directory}: expected a model saved by this version of cfgen-augment; its "
                f"configuration and weights do not fit together ({error}). Save the model again."
            ) from error
        return model.to(resolved)

    def _restore(self, fitted: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.attributes_ = Attributes.from_json(fitted["attributes"])
        self.modalities_ = tuple(Modality(**entry) for entry in fitted["modalities"])
        names = fitted["feature_names"]
        if names is not None:
            names = by_name(self.modalities_, [np.array(own, dtype=str) for own in names])
        self.feature_names_ = names
        self.dtype_ = by_name(self.modalities_, [np.dtype(own) for own in fitted["dtypes"]])
        self.size_factor_ = SizeFactors.from_json(fitted["size_factor"])
        self.label_counts_ = np.array(fitted["label_counts"])
        self.history_ = {name: History(**entry) for name, entry in fitted["history"].items()}
        self._restore_network(tensors)

    def _parameters(self) -> dict[str, Any]:
        """Constructor parameters that a saved model keeps: not where it ran, no live generators."""
        names = inspect.signature(type(self).__init__).parameters.keys()
        kept = names - {"self", "device", "distributed", "random_state"}
        parameters = {name: getattr(self, name) for name in sorted(kept)}
        parameters["random_state"] = (
            int(self.random_state) if isinstance(self.random_state, Integral) else None
        )
        return parameters

    def to(self, device: str | torch.device) -> Self:
        """Move the fitted model to a device, in place.

        Parameters
        ----------
        device
            ``"auto"``, ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

        Returns
        -------
        CFGen
            Itself.

        Raises
        ------
        ValueError
            If the device is unknown or absent.
        """
        self._check_fitted()
        self.network_.to(resolve_device(str(device)))
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Weights as NumPy arrays on the CPU: readable anywhere, and equal models hash equal."""
        state = self.__dict__.copy()
        if "network_" in state:
            weights = self.network_.state_dict()
            state["network_"] = {name: t.cpu().numpy() for name, t in weights.items()}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the networks around the weights."""
        weights = state.pop("network_", None)
        self.__dict__.update(state)
        if weights is not None:
            self._restore_network({n: torch.from_numpy(w.copy()) for n, w in weights.items()})

    def _restore_network(self, weights: dict[str, Tensor]) -> None:
        network = self._layout()
        network.load_state_dict(weights, strict=True, assign=True)
        self.network_ = network.eval().requires_grad_(False)

    def _check_fitted(self) -> None:
        if not hasattr(self, "network_"):
            raise RuntimeError(
                "CFGen: expected a fitted model; got one that is not. Call fit first."
            )
