"""Engines that multiply integers: graphs, sessions, and what stands for a network in a pipeline."""

from ptqd.engines.calls import captured
from ptqd.engines.cpu import Processor, overflows, processor_name
from ptqd.engines.export import Exported, for_engine
from ptqd.engines.module import EngineModule
from ptqd.engines.sessions import OnnxRuntimeSession, OpenVinoSession, read_graph

__all__ = [
    "EngineModule",
    "Exported",
    "OnnxRuntimeSession",
    "OpenVinoSession",
    "Processor",
    "captured",
    "for_engine",
    "overflows",
    "processor_name",
    "read_graph",
]
