"""The app of a hospital: it answers each of the server's questions with the function of `fedssg_helpers.client`."""

import traceback

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedssg_helpers.client import ANSWERS, Absence
from fedssg_helpers.keys import one_thread
from fedssg_helpers.models import Backbone

from . import task

app = ClientApp()


def answering(question: str):
    """Flower's handler of a question: open the message, let the hospital answer, send the answer."""

    def handle(message: Message, context: Context) -> Message:
        try:
            hospital = task.hospital_of(context)
            content = task.decode(message.content)
            made_by = content["method"].network if "method" in content else Backbone()
            net = task.network(made_by, hospital.data.images.shape[1], len(hospital.classes))
            with one_thread():
                answer = ANSWERS[question](hospital, content, net)
            task.keep(hospital, context.state)
            answer |= {"hospital": hospital.k}
        except Absence as absence:
            answer = {"why": str(absence)}
        except Exception as error:  # the server goes on without this answer; the hospital's own log says more
            traceback.print_exc()
            answer = {"why": str(error) or type(error).__name__}
        return Message(task.encode(answer), reply_to=message)

    return handle


for name, kind in task.KINDS.items():
    getattr(app, kind)(name)(answering(name))  # as the decorator @app.train("update") does
