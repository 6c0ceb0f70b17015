"""A research team: a planner, parallel researchers, a writer and a critic.

    python app.py "Why do agents need a different kind of serving?"

Ordinary LangGraph and `ChatOpenAI`; the only line about Maestro is `graph = workflow(...)`. It runs
against any OpenAI-compatible server: set OPENAI_BASE_URL, or MAESTRO_BASE_URL for Maestro.
"""

import argparse
import json
import operator
import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, TypeVar

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send
from openai import LengthFinishReasonError
from pydantic import BaseModel, Field

from maestro_agents import workflow

QUESTION = "Why do agents need a different kind of LLM serving?"
MAX_ROUNDS = 2
RESEARCH_MODEL = os.environ.get("RESEARCH_MODEL", "smollm2-135m")
CRITIC_MODEL = os.environ.get("CRITIC_MODEL", "tiny-llama")

Short = Annotated[str, Field(max_length=60)]
Schema = TypeVar("Schema", bound=BaseModel)


class Plan(BaseModel):
    """Two or three short sub-questions."""

    questions: list[Short] = Field(min_length=2, max_length=3)


class Review(BaseModel):
    """Whether a draft is good enough."""

    verdict: Literal["approve", "revise"]
    reason: str = Field(max_length=10)


class TeamState(TypedDict, total=False):
    question: str
    sub_questions: list[str]
    notes: Annotated[list[str], operator.add]
    draft: str
    review: dict[str, str]
    rounds: int


class FindingState(TypedDict):
    notes: Annotated[list[str], operator.add]


class ResearcherState(FindingState, total=False):
    sub_question: str
    query: str
    found: str


def chat(model: str, max_tokens: int) -> ChatOpenAI:
    """A chat model on the server that the environment names."""
    if base_url := os.environ.get("MAESTRO_BASE_URL"):
        api_key = os.environ.get("MAESTRO_API_KEY")
    else:
        base_url, api_key = os.environ.get("OPENAI_BASE_URL"), os.environ.get("OPENAI_API_KEY")
    return ChatOpenAI(
        model=model,
        base_url=base_url or None,
        api_key=api_key or "EMPTY",
        temperature=0,
        max_tokens=max_tokens,
    )


def structured(model: ChatOpenAI, schema: type[Schema], prompt: str) -> Schema | None:
    """The model's reply as `schema`; None when a small model got it wrong or ran out of tokens."""
    try:
        return model.with_structured_output(schema, method="json_schema").invoke(prompt)
    except (LengthFinishReasonError, ValueError):
        return None


# -- the tool ------------------------------------------------------------------------------------

NOTES = Path(__file__).with_name("notes.txt").read_text(encoding="utf-8").strip().split("\n\n")


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]{3,}", text.lower()))


@tool
def search_notes(query: str) -> str:
    """Search the notes on LLM serving; returns the two that fit best."""
    wanted = words(query)
    return "\n".join(sorted(NOTES, key=lambda note: len(wanted & words(note)), reverse=True)[:2])


# -- a researcher: three steps, run once per sub-question ----------------------------------------

ask_model = chat(RESEARCH_MODEL, 48).bind_tools([search_notes], tool_choice="search_notes")
summary_model = chat(RESEARCH_MODEL, 64)


def ask(state: ResearcherState) -> dict[str, Any]:
    reply = ask_model.invoke(f"Search the notes to answer: {state['sub_question']}")
    arguments = reply.tool_calls[0]["args"] if reply.tool_calls else {}
    return {"query": str(arguments.get("query") or state["sub_question"])}


def search(state: ResearcherState) -> dict[str, Any]:
    return {"found": search_notes.invoke({"query": state["query"]})}


def summarise(state: ResearcherState) -> dict[str, Any]:
    reply = summary_model.invoke(
        f"Notes:\n{state['found']}\n\nIn two sentences, answer: {state['sub_question']}"
    )
    return {"notes": [f"{state['sub_question']} {reply.text.strip()}"]}


researcher = StateGraph(ResearcherState, output_schema=FindingState)
researcher.add_node("ask", ask)
researcher.add_node("search", search)
researcher.add_node("summarise", summarise)
researcher.add_edge(START, "ask")
researcher.add_edge("ask", "search")
researcher.add_edge("search", "summarise")
researcher.add_edge("summarise", END)

# -- the team ------------------------------------------------------------------------------------

plan_model = chat(RESEARCH_MODEL, 96)
write_model = chat(RESEARCH_MODEL, 128)
critic_model = chat(CRITIC_MODEL, 48)


def planner(state: TeamState) -> dict[str, Any]:
    prompt = f"Split this into 2 or 3 short sub-questions, as JSON: {state['question']}"
    plan = structured(plan_model, Plan, prompt)
    questions = [text.strip() for text in plan.questions if text.strip()] if plan else []
    fallback = [f"What is behind this: {state['question']}", f"In practice: {state['question']}"]
    return {"sub_questions": questions or fallback}


def assign(state: TeamState) -> list[Send]:
    return [Send("researcher", {"sub_question": text}) for text in state["sub_questions"]]


def writer(state: TeamState) -> dict[str, Any]:
    prompt = "Notes:\n" + "\n".join(state["notes"]) + f"\n\nAnswer briefly: {state['question']}"
    draft = "".join(chunk.text for chunk in write_model.stream(prompt))
    return {"draft": draft.strip(), "rounds": state.get("rounds", 0) + 1}


def critic(state: TeamState) -> dict[str, Any]:
    prompt = f"Review this answer, as JSON.\n{state['question']}\n{state['draft'][:300]}"
    review = structured(critic_model, Review, prompt)
    fallback = {"verdict": "approve", "reason": "unreadable"}
    return {"review": review.model_dump() if review else fallback}


def decide(state: TeamState) -> Literal["writer", "__end__"]:
    done = state["review"]["verdict"] == "approve" or state["rounds"] >= MAX_ROUNDS
    return "__end__" if done else "writer"


builder = StateGraph(TeamState)
builder.add_node("planner", planner)
builder.add_node("researcher", researcher.compile())
builder.add_node("writer", writer)
builder.add_node("critic", critic)
builder.add_edge(START, "planner")
builder.add_conditional_edges("planner", assign, ["researcher"])
builder.add_edge("researcher", "writer")
builder.add_edge("writer", "critic")
builder.add_conditional_edges("critic", decide)

graph = workflow(builder.compile(name="research_team"), slo="interactive", deadline=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask the research team a question.")
    parser.add_argument("question", nargs="?", default=QUESTION)
    parser.add_argument("--json", action="store_true", help="print everything as one JSON object")
    arguments = parser.parse_args()
    if not any(os.environ.get(f"{name}_BASE_URL") for name in ("MAESTRO", "OPENAI")):
        sys.exit("Name a server first: export OPENAI_BASE_URL=http://127.0.0.1:8000/v1")
    result = graph.invoke({"question": arguments.question})
    print(json.dumps(result) if arguments.json else result["draft"])


if __name__ == "__main__":
    main()
