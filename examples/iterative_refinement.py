"""Iterative refinement: three revisers in sequence, pass after pass, until one has enough.

    python iterative_refinement.py "Announce the new release in a short post."

After each pass a judge may stop; where the facts are right, the simplifier is left out.
Ordinary LangGraph and `ChatOpenAI`; the only line about Maestro is `graph = workflow(...)`.
"""

import argparse
import json
import os
import sys
from typing import Any, Literal, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from openai import LengthFinishReasonError
from pydantic import BaseModel

from maestro_agents import workflow

QUESTION = "Announce the new release in a short post."
MAX_PASSES = 3
MAESTRO = os.environ.get("MAESTRO_BASE_URL")

model = ChatOpenAI(
    model=os.environ.get("MODEL", "smollm2-135m"),
    base_url=MAESTRO or os.environ.get("OPENAI_BASE_URL"),
    api_key=os.environ.get("MAESTRO_API_KEY" if MAESTRO else "OPENAI_API_KEY") or "EMPTY",
    temperature=0,
    max_tokens=96,
)


class Check(BaseModel):
    """Whether a text needs more work."""

    state: Literal["needs work", "fine"]


class Text(TypedDict, total=False):
    question: str
    answer: str
    passes: int
    fine: bool


def structured(schema: type[BaseModel], prompt: str) -> Any:
    """The model's reply as a `schema`; None when a small model got it wrong."""
    try:
        return model.with_structured_output(schema, method="json_schema").invoke(prompt)
    except (LengthFinishReasonError, ValueError):
        return None


def revise(state: Text, how: str) -> dict[str, Any]:
    reply = model.invoke(f"{how}\n\n{state['answer'][:800]}")
    return {"answer": reply.text.strip() or state["answer"]}


def check(state: Text, question: str) -> bool:
    found = structured(Check, f"{question} Answer as JSON.\n\n{state['answer'][:800]}")
    return found is None or found.state == "fine"


def author(state: Text) -> dict[str, Any]:
    return {"answer": model.invoke(state["question"]).text.strip(), "passes": 0}


def fact_checker(state: Text) -> dict[str, Any]:
    return {"fine": check(state, "Is a claim in this text wrong?"), "passes": state["passes"] + 1}


def simplifier(state: Text) -> dict[str, Any]:
    return revise(state, "Say this in plainer words:")


def stylist(state: Text) -> dict[str, Any]:
    return revise(state, "Polish the style of this:")


def judge(state: Text) -> dict[str, Any]:
    return {"fine": check(state, "Does this text need another pass?")}


def after_facts(state: Text) -> Literal["stylist", "simplifier"]:
    return "stylist" if state["fine"] else "simplifier"


def after_pass(state: Text) -> Literal["fact_checker", "__end__"]:
    return "__end__" if state["fine"] or state["passes"] >= MAX_PASSES else "fact_checker"


builder = StateGraph(Text)
for node in (author, fact_checker, simplifier, stylist, judge):
    builder.add_node(node)
builder.add_edge(START, "author")
builder.add_edge("author", "fact_checker")
builder.add_conditional_edges("fact_checker", after_facts)
builder.add_edge("simplifier", "stylist")
builder.add_edge("stylist", "judge")
builder.add_conditional_edges("judge", after_pass)

graph = workflow(builder.compile(name="iterative_refinement"), slo="batch")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--json", action="store_true", help="print everything, as JSON")
    arguments = parser.parse_args()
    if not any(os.environ.get(f"{name}_BASE_URL") for name in ("MAESTRO", "OPENAI")):
        sys.exit("Name a server first: export OPENAI_BASE_URL=http://127.0.0.1:8000/v1")
    result = graph.invoke({"question": arguments.question})
    print(json.dumps(result) if arguments.json else result["answer"])
