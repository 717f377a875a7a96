"""Runs packed models without torch: `load` one, give it to an `Engine`, `submit` requests, iterate over the answers."""

from shrew.runtime.answer import Answer
from shrew.runtime.engine import Engine
from shrew.runtime.manifest import Manifest
from shrew.runtime.pack import Model, load
from shrew.runtime.request import Constraint, Piece, Request, Token, Usage

__all__ = ["Answer", "Constraint", "Engine", "Manifest", "Model", "Piece", "Request", "Token", "Usage", "load"]
