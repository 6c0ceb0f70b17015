"""A supervisor: it hands the work to one worker after the other by tool call, then a writer ends.

    python supervisor.py "How much does a GPU cost per answer?"

Ordinary LangGraph and `ChatOpenAI`; the only line about Maestro is `graph = workflow(...)`.
"""

import argparse
import json
import operator
import os
import sys
from typing import Annotated, Any, Literal, TypedDict

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.types import Command

from maestro_agents import workflow

QUESTION = "How much does a GPU cost per answer?"
MAX_TASKS = 4
MAESTRO = os.environ.get("MAESTRO_BASE_URL")

model = ChatOpenAI(
    model=os.environ.get("MODEL", "smollm2-135m"),
    base_url=MAESTRO or os.environ.get("OPENAI_BASE_URL"),
    api_key=os.environ.get("MAESTRO_API_KEY" if MAESTRO else "OPENAI_API_KEY") or "EMPTY",
    temperature=0,
    max_tokens=96,
)

Member = Literal["researcher", "analyst", "sceptic", "writer"]


class Team(TypedDict, total=False):
    question: str
    task: str
    results: Annotated[list[str], operator.add]
    answer: str


@tool
def delegate(worker: Member, task: str) -> str:
    """Give a task to a worker; the writer writes the final answer."""
    return f"{worker}: {task}"


def known(state: Team) -> str:
    """The question and what is known so far, short enough for a small model."""
    return f"{state['question']}\n\n" + "\n".join(state.get("results", [])[-3:])


def supervisor(state: Team) -> Command[Member]:
    caller = model.bind_tools([delegate], tool_choice="delegate")
    calls = caller.invoke(f"{known(state)}\n\nWho should work on this next?").tool_calls
    chosen = calls[0]["args"] if calls else {}
    worker = chosen.get("worker")
    if worker not in WORKERS:
        worker = "writer"
    return Command(goto=worker, update={"task": str(chosen.get("task", ""))[:200]})


def work(worker: str, how: str, state: Team) -> dict[str, Any]:
    reply = model.invoke(f"{known(state)}\n\n{how} {state['task']}")
    return {"results": [f"{worker}: {reply.text.strip()[:300]}"]}


def researcher(state: Team) -> dict[str, Any]:
    return work("researcher", "State two facts on this.", state)


def analyst(state: Team) -> dict[str, Any]:
    return work("analyst", "Work this out step by step.", state)


def sceptic(state: Team) -> dict[str, Any]:
    return work("sceptic", "Say what could be wrong here.", state)


def writer(state: Team) -> dict[str, Any]:
    return {"answer": model.invoke(f"{known(state)}\n\nAnswer the question.").text.strip()}


def after_work(state: Team) -> Literal["supervisor", "writer"]:
    return "writer" if len(state["results"]) >= MAX_TASKS else "supervisor"


WORKERS = {"researcher": researcher, "analyst": analyst, "sceptic": sceptic}

builder = StateGraph(Team)
builder.add_node("supervisor", supervisor)
builder.add_edge(START, "supervisor")
for name, worker in WORKERS.items():
    builder.add_node(name, worker)
    builder.add_conditional_edges(name, after_work)
builder.add_node("writer", writer)
builder.add_edge("writer", END)

graph = workflow(builder.compile(name="supervisor"), slo="standard", deadline=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--json", action="store_true", help="print everything, as JSON")
    arguments = parser.parse_args()
    if not any(os.environ.get(f"{name}_BASE_URL") for name in ("MAESTRO", "OPENAI")):
        sys.exit("Name a server first: export OPENAI_BASE_URL=http://127.0.0.1:8000/v1")
    result = graph.invoke({"question": arguments.question})
    print(json.dumps(result) if arguments.json else result["answer"])
