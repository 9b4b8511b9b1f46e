"""A stand-in for api.kaggle.com on the loopback: what Kaggle's client 2.2.5 calls to upload, push, watch and submit.

The unmodified client is sent here by HTTPS_PROXY: the stand-in answers CONNECT itself and speaks TLS with a certificate of
its own, which the client trusts by REQUESTS_CA_BUNDLE. No other host can be reached through it.
"""

import datetime
import json
import ssl
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

HOST = "api.kaggle.com"


class Standin:
    """Answers as Kaggle does; `requests` are (endpoint, body) as they came, `blobs` the uploaded bytes by name.

    `datasets` maps ids to version numbers, `slow` is how many status calls a new version takes to be ready, `outcome` what
    it then is; a pushed kernel has run at once, and left `output`. `answers` maps an endpoint such as
    `kernels.KernelsApiService/SaveKernel` to the (status, body) it gives.
    """

    def __init__(self, folder):
        self.requests, self.blobs, self.tokens, self.datasets, self.pending, self.answers = [], {}, {}, {}, {}, {}
        self.slow, self.outcome, self.users, self.hosts = 0, "READY", set(), set()
        self.log, self.output = ([{"stream_name": "stdout", "time": 1.0, "data": "submission: submission.json\n"}],
                                 {"submission.json": b"{}"})
        self.tls = _tls(folder)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"standin": self}))
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        self.environment = {"HTTPS_PROXY": self.address, "NO_PROXY": "127.0.0.1", "REQUESTS_CA_BUNDLE": str(folder / "standin.crt")}
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def called(self, name: str) -> list[dict]:
        """The bodies of the requests to the endpoint of this name."""
        return [body for endpoint, body in self.requests if endpoint.endswith(f"/{name}")]

    def answer(self, endpoint: str, body: dict) -> tuple[int, dict]:
        """(HTTP status, JSON) for a call; service and field names are kagglesdk 0.1.38's."""
        self.requests.append((endpoint, body))
        name = endpoint.rpartition("/")[2]
        if name == "IntrospectToken" and endpoint not in self.answers:
            return 200, {"active": True, "username": "someone"}
        if endpoint in self.answers:
            return self.answers[endpoint]
        return getattr(self, f"on_{name}", lambda body: (501, {"code": 501, "message": f"no {endpoint} here"}))(body)

    def on_GetDatasetStatus(self, body):
        ref = f"{body['ownerSlug']}/{body['datasetSlug']}"
        if ref not in self.datasets:
            return 404, {"code": 404, "message": "Not found"}
        self.pending[ref] = self.pending.get(ref, 0) - 1
        return 200, {"status": "BLOBS_RECEIVED" if self.pending[ref] >= 0 else self.outcome}

    def on_GetDataset(self, body):
        return 200, {"id": 1, "currentVersionNumber": self.datasets[f"{body['ownerSlug']}/{body['datasetSlug']}"]}

    def on_StartBlobUpload(self, body):
        token = f"token-{len(self.tokens)}"
        self.tokens[token] = body["name"]
        return 200, {"token": token, "createUrl": f"{self.address}/upload/{token}"}

    def on_CreateDataset(self, body):
        return self.new_version(f"{body['ownerSlug']}/{body['slug']}")

    def on_CreateDatasetVersion(self, body):
        return self.new_version(f"{body['ownerSlug']}/{body['datasetSlug']}")

    def new_version(self, ref):
        self.datasets[ref] = self.datasets.get(ref, 0) + 1
        self.pending[ref] = self.slow
        return 200, {"ref": ref, "url": f"https://www.kaggle.com/datasets/{ref}", "status": "ok", "error": ""}

    def on_SaveKernel(self, body):
        return 200, {"ref": body["slug"], "url": f"https://www.kaggle.com/code/{body['slug']}", "error": "",
                     "versionNumber": len(self.called("SaveKernel"))}

    def on_GetKernelSessionStatus(self, body):
        return 200, {"status": "COMPLETE"}

    def on_ListKernelSessionOutput(self, body):
        return 200, {"files": [{"url": f"{self.address}/output/{name}", "fileName": name} for name in self.output],
                     "log": json.dumps(self.log)}

    def on_GetAcceleratorQuotaStatistics(self, body):
        return 200, {"gpuQuota": {"timeUsed": "3600s", "totalTimeAllowed": "108000s"}}

    def on_CreateCodeSubmission(self, body):
        return 200, {"message": "Successfully submitted", "ref": len(self.called("CreateCodeSubmission"))}

    def on_ListSubmissions(self, body):
        made = self.called("CreateCodeSubmission")
        return 200, {"submissions": [{"ref": i + 1, "fileName": made[i]["fileName"], "description": made[i]["submissionDescription"],
                                      "status": "COMPLETE", "publicScore": "4.17"} for i in range(len(made))]}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    standin: Standin

    def do_CONNECT(self):
        host, _, port = self.path.partition(":")
        self.standin.hosts.add(host)
        if (host, port) != (HOST, "443"):
            return self.reply(403, {})
        self.send_response(200)
        self.end_headers()
        self.request = self.connection = self.standin.tls.wrap_socket(self.connection, server_side=True)
        self.setup()
        self.close_connection = False

    def do_POST(self):
        body = json.loads(self.content() or b"{}")
        if credentials := self.headers.get("Authorization"):
            self.standin.users.add(credentials)
        self.reply(*self.standin.answer(urllib.parse.urlsplit(self.path).path.removeprefix("/v1/"), body))

    def do_GET(self):
        """The log of a kernel's run, as Kaggle gives it when the run is over, and the files it left."""
        path = urllib.parse.urlsplit(self.path).path
        if path.startswith("/v1/kernels/logs/stream/"):
            return self.reply(200, self.standin.log)
        self.reply(200, self.standin.output[path.removeprefix("/output/")])

    def do_PUT(self):
        self.standin.blobs[self.standin.tokens[self.path.rpartition("/")[2]]] = self.content()
        self.reply(200, {})

    def content(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def reply(self, status, value):
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for header in (("Content-Type", "application/json"), ("Content-Length", str(len(data))), ("Retry-After", "0")):
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


def _tls(folder) -> ssl.SSLContext:
    """A server's TLS with a fresh self-signed certificate for HOST, written to `folder`/standin.crt for the client."""
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, HOST)])
    usage = {field: field in ("digital_signature", "key_cert_sign") for field in (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign",
        "encipher_only", "decipher_only")}
    certificate = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
                   .serial_number(x509.random_serial_number()).not_valid_before(now - datetime.timedelta(hours=1))
                   .not_valid_after(now + datetime.timedelta(days=1))
                   .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
                   .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
                   .add_extension(x509.KeyUsage(**usage), critical=True)
                   .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
                   .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
                   .sign(key, hashes.SHA256()))
    (folder / "standin.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "standin.key").write_bytes(key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "standin.crt", folder / "standin.key")
    return context
