"""A teacher behind a server: it scores the student's tokens, or writes demonstrations."""

from selfdistill.teachers.server.teacher import ServerTeacher

__all__ = ["ServerTeacher"]
