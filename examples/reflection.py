"""Reflection: a writer and a critic take turns until the critic approves.

    python reflection.py "Explain paged memory to a new colleague."

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
from pydantic import BaseModel, Field

from maestro_agents import workflow

QUESTION = "Explain paged memory to a new colleague."
MAX_DRAFTS = 4
MAESTRO = os.environ.get("MAESTRO_BASE_URL")

model = ChatOpenAI(
    model=os.environ.get("MODEL", "smollm2-135m"),
    base_url=MAESTRO or os.environ.get("OPENAI_BASE_URL"),
    api_key=os.environ.get("MAESTRO_API_KEY" if MAESTRO else "OPENAI_API_KEY") or "EMPTY",
    temperature=0,
    max_tokens=96,
)


class Review(BaseModel):
    """What a critic thinks of a draft."""

    verdict: Literal["approve", "revise"]
    advice: str = Field(max_length=60)


class Draft(TypedDict, total=False):
    question: str
    answer: str
    drafts: int
    verdict: str
    advice: str


def structured(schema: type[BaseModel], prompt: str) -> Any:
    """The model's reply as a `schema`; None when a small model got it wrong."""
    try:
        return model.with_structured_output(schema, method="json_schema").invoke(prompt)
    except (LengthFinishReasonError, ValueError):
        return None


def writer(state: Draft) -> dict[str, Any]:
    prompt = state["question"]
    if "answer" in state:
        prompt += f"\n\nImprove this draft: {state['answer'][:600]}\nAdvice: {state['advice']}"
    reply = model.invoke(prompt)
    return {"answer": reply.text.strip(), "drafts": state.get("drafts", 0) + 1}


def critic(state: Draft) -> dict[str, Any]:
    prompt = f"Review this answer, as JSON.\n{state['question']}\n{state['answer'][:600]}"
    review = structured(Review, prompt)
    if review is None:
        return {"verdict": "approve", "advice": ""}
    return {"verdict": review.verdict, "advice": review.advice}


def decide(state: Draft) -> Literal["writer", "__end__"]:
    done = state["verdict"] == "approve" or state["drafts"] >= MAX_DRAFTS
    return "__end__" if done else "writer"


builder = StateGraph(Draft)
builder.add_node("writer", writer)
builder.add_node("critic", critic)
builder.add_edge(START, "writer")
builder.add_edge("writer", "critic")
builder.add_conditional_edges("critic", decide)

graph = workflow(builder.compile(name="reflection"), slo="interactive", deadline=60)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--json", action="store_true", help="print everything, as JSON")
    arguments = parser.parse_args()
    if not any(os.environ.get(f"{name}_BASE_URL") for name in ("MAESTRO", "OPENAI")):
        sys.exit("Name a server first: export OPENAI_BASE_URL=http://127.0.0.1:8000/v1")
    result = graph.invoke({"question": arguments.question})
    print(json.dumps(result) if arguments.json else result["answer"])
