"""Parallel experts: three of them look at a question side by side, a synthesis joins what they say.

    python parallel_experts.py "Should we move our service to another cloud?"

When they disagree, an arbiter has the last word.
Ordinary LangGraph and `ChatOpenAI`; the only line about Maestro is `graph = workflow(...)`.
"""

import argparse
import json
import operator
import os
import sys
from functools import partial
from typing import Annotated, Any, Literal, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from openai import LengthFinishReasonError
from pydantic import BaseModel, Field

from maestro_agents import workflow

QUESTION = "Should we move our service to another cloud?"
EXPERTS = {"economist": "an economist", "engineer": "an engineer", "lawyer": "a lawyer"}
MAESTRO = os.environ.get("MAESTRO_BASE_URL")

model = ChatOpenAI(
    model=os.environ.get("MODEL", "smollm2-135m"),
    base_url=MAESTRO or os.environ.get("OPENAI_BASE_URL"),
    api_key=os.environ.get("MAESTRO_API_KEY" if MAESTRO else "OPENAI_API_KEY") or "EMPTY",
    temperature=0,
    max_tokens=96,
)


class Opinion(BaseModel):
    """An expert's opinion."""

    stance: Literal["for", "against"]
    reason: str = Field(max_length=80)


class Panel(TypedDict, total=False):
    question: str
    brief: str
    opinions: Annotated[list[dict[str, str]], operator.add]
    answer: str


def structured(schema: type[BaseModel], prompt: str) -> Any:
    """The model's reply as a `schema`; None when a small model got it wrong."""
    try:
        return model.with_structured_output(schema, method="json_schema").invoke(prompt)
    except (LengthFinishReasonError, ValueError):
        return None


def moderator(state: Panel) -> dict[str, Any]:
    return {"brief": model.invoke(f"Restate in one sentence: {state['question']}").text.strip()}


def opine(expert: str, state: Panel) -> dict[str, Any]:
    prompt = f"You are {expert}. For or against? As JSON.\n{state['question']}\n{state['brief']}"
    opinion = structured(Opinion, prompt)
    known = opinion.model_dump() if opinion else {"stance": "against", "reason": "unreadable"}
    return {"opinions": [{"expert": expert, **known}]}


def said(state: Panel) -> str:
    return "\n".join(f"{o['expert']}: {o['stance']}, {o['reason']}" for o in state["opinions"])


def synthesis(state: Panel) -> dict[str, Any]:
    prompt = f"{said(state)}\n\nSum this up as an answer to: {state['question']}"
    return {"answer": model.invoke(prompt).text.strip()}


def arbiter(state: Panel) -> dict[str, Any]:
    prompt = f"{said(state)}\n{state['answer'][:400]}\n\nDecide: {state['question']}"
    return {"answer": model.invoke(prompt).text.strip()}


def agreed(state: Panel) -> Literal["arbiter", "__end__"]:
    return "__end__" if len({o["stance"] for o in state["opinions"]}) == 1 else "arbiter"


builder = StateGraph(Panel)
builder.add_node("moderator", moderator)
builder.add_edge(START, "moderator")
for name, title in EXPERTS.items():
    builder.add_node(name, partial(opine, title))
    builder.add_edge("moderator", name)
builder.add_node("synthesis", synthesis)
builder.add_node("arbiter", arbiter)
builder.add_edge(list(EXPERTS), "synthesis")
builder.add_conditional_edges("synthesis", agreed)
builder.add_edge("arbiter", END)

graph = workflow(builder.compile(name="parallel_experts"), slo="interactive", deadline=60)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--json", action="store_true", help="print everything, as JSON")
    arguments = parser.parse_args()
    if not any(os.environ.get(f"{name}_BASE_URL") for name in ("MAESTRO", "OPENAI")):
        sys.exit("Name a server first: export OPENAI_BASE_URL=http://127.0.0.1:8000/v1")
    result = graph.invoke({"question": arguments.question})
    print(json.dumps(result) if arguments.json else result["answer"])
