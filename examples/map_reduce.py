"""Map and reduce: a planner picks the aspects to cover, writers cover them, an editor joins them.

    python map_reduce.py "How does an LLM server share its memory?"

Ordinary LangGraph and `ChatOpenAI`; the only line about Maestro is `graph = workflow(...)`.
"""

import argparse
import json
import operator
import os
import sys
from typing import Annotated, Any, Literal, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send
from openai import LengthFinishReasonError
from pydantic import BaseModel

from maestro_agents import workflow

QUESTION = "How does an LLM server share its memory?"
ENOUGH = 600  # characters that the editor reads at once; longer notes are condensed first
MAESTRO = os.environ.get("MAESTRO_BASE_URL")

model = ChatOpenAI(
    model=os.environ.get("MODEL", "smollm2-135m"),
    base_url=MAESTRO or os.environ.get("OPENAI_BASE_URL"),
    api_key=os.environ.get("MAESTRO_API_KEY" if MAESTRO else "OPENAI_API_KEY") or "EMPTY",
    temperature=0,
    max_tokens=96,
)


class Plan(BaseModel):
    """Which aspects the answer should cover."""

    history: bool
    cost: bool
    examples: bool


class Article(TypedDict, total=False):
    question: str
    aspects: list[str]
    notes: Annotated[list[str], operator.add]
    condensed: str
    answer: str


class Part(TypedDict):
    question: str
    aspect: str


def structured(schema: type[BaseModel], prompt: str) -> Any:
    """The model's reply as a `schema`; None when a small model got it wrong."""
    try:
        return model.with_structured_output(schema, method="json_schema").invoke(prompt)
    except (LengthFinishReasonError, ValueError):
        return None


def planner(state: Article) -> dict[str, Any]:
    plan = structured(Plan, f"Which aspects matter for this? As JSON: {state['question']}")
    picked = [aspect for aspect, wanted in plan.model_dump().items() if wanted] if plan else []
    return {"aspects": picked}


def split(state: Article) -> list[Send] | Literal["editor"]:
    """One writer per aspect; a question that needs none goes to the editor as it is."""
    parts = [Part(question=state["question"], aspect=aspect) for aspect in state["aspects"]]
    return [Send("writer", part) for part in parts] or "editor"


def writer(state: Part) -> dict[str, Any]:
    reply = model.invoke(f"{state['question']}\nTwo sentences on its {state['aspect']} only.")
    return {"notes": [f"{state['aspect']}: {reply.text.strip()}"]}


def collect(state: Article) -> dict[str, Any]:
    return {"condensed": "\n".join(state["notes"])}


def fits(state: Article) -> Literal["condenser", "editor"]:
    return "editor" if len(state["condensed"]) <= ENOUGH else "condenser"


def condenser(state: Article) -> dict[str, Any]:
    return {"condensed": model.invoke(f"Shorten this:\n{state['condensed'][:1500]}").text.strip()}


def editor(state: Article) -> dict[str, Any]:
    notes = state.get("condensed", "")[:ENOUGH]
    return {"answer": model.invoke(f"{notes}\n\nAnswer: {state['question']}").text.strip()}


builder = StateGraph(Article)
for node in (planner, writer, collect, condenser, editor):
    builder.add_node(node)
builder.add_edge(START, "planner")
builder.add_conditional_edges("planner", split, ["writer", "editor"])
builder.add_edge("writer", "collect")
builder.add_conditional_edges("collect", fits)
builder.add_edge("condenser", "editor")
builder.add_edge("editor", END)

graph = workflow(builder.compile(name="map_reduce"), slo="standard")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--json", action="store_true", help="print everything, as JSON")
    arguments = parser.parse_args()
    if not any(os.environ.get(f"{name}_BASE_URL") for name in ("MAESTRO", "OPENAI")):
        sys.exit("Name a server first: export OPENAI_BASE_URL=http://127.0.0.1:8000/v1")
    result = graph.invoke({"question": arguments.question})
    print(json.dumps(result) if arguments.json else result["answer"])
