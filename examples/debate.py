"""A debate: two sides speak in turn until a moderator has heard enough, then a judge decides.

    python debate.py "Should small teams train their own models?"

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
from openai import LengthFinishReasonError
from pydantic import BaseModel

from maestro_agents import workflow

QUESTION = "Should small teams train their own models?"
MAX_ROUNDS = 3
MAESTRO = os.environ.get("MAESTRO_BASE_URL")

model = ChatOpenAI(
    model=os.environ.get("MODEL", "smollm2-135m"),
    base_url=MAESTRO or os.environ.get("OPENAI_BASE_URL"),
    api_key=os.environ.get("MAESTRO_API_KEY" if MAESTRO else "OPENAI_API_KEY") or "EMPTY",
    temperature=0,
    max_tokens=96,
)


class Ruling(BaseModel):
    """Whether another round would help."""

    decision: Literal["another round", "enough"]


class Debate(TypedDict, total=False):
    question: str
    turns: Annotated[list[str], operator.add]
    rounds: int
    more: bool
    answer: str


def structured(schema: type[BaseModel], prompt: str) -> Any:
    """The model's reply as a `schema`; None when a small model got it wrong."""
    try:
        return model.with_structured_output(schema, method="json_schema").invoke(prompt)
    except (LengthFinishReasonError, ValueError):
        return None


def heard(state: Debate) -> str:
    """The question and the last turns, short enough for a small model."""
    return f"{state['question']}\n\n" + "\n".join(state.get("turns", [])[-4:])


def speak(side: str, stance: str, state: Debate) -> dict[str, Any]:
    reply = model.invoke(f"{heard(state)}\n\nArgue {stance} it in two sentences.")
    return {"turns": [f"{side}: {reply.text.strip()[:300]}"]}


def pro(state: Debate) -> dict[str, Any]:
    return speak("Pro", "for", state)


def con(state: Debate) -> dict[str, Any]:
    return speak("Con", "against", state)


def moderator(state: Debate) -> dict[str, Any]:
    prompt = f"{heard(state)}\n\nDoes the debate need another round? Answer as JSON."
    ruling = structured(Ruling, prompt)
    rounds = state.get("rounds", 0) + 1
    more = ruling is not None and ruling.decision == "another round" and rounds < MAX_ROUNDS
    return {"rounds": rounds, "more": more}


def judge(state: Debate) -> dict[str, Any]:
    reply = model.invoke(f"{heard(state)}\n\nWho was more convincing, and why?")
    return {"answer": reply.text.strip()}


def decide(state: Debate) -> Literal["pro", "judge"]:
    return "pro" if state["more"] else "judge"


builder = StateGraph(Debate)
for node in (pro, con, moderator, judge):
    builder.add_node(node)
builder.add_edge(START, "pro")
builder.add_edge("pro", "con")
builder.add_edge("con", "moderator")
builder.add_conditional_edges("moderator", decide)
builder.add_edge("judge", END)

graph = workflow(builder.compile(name="debate"), slo="interactive", deadline=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--json", action="store_true", help="print everything, as JSON")
    arguments = parser.parse_args()
    if not any(os.environ.get(f"{name}_BASE_URL") for name in ("MAESTRO", "OPENAI")):
        sys.exit("Name a server first: export OPENAI_BASE_URL=http://127.0.0.1:8000/v1")
    result = graph.invoke({"question": arguments.question})
    print(json.dumps(result) if arguments.json else result["answer"])
