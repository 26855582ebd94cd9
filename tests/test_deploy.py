"""The files of deploy/ say what docs/deploy.md says, and fit the options of the server."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from configparser import RawConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from belle_compile.runtime.scale_out.options import Arguments, parse_serve
from belle_compile.runtime.server.options import ServerOptions, all_options, option_name
from belle_compile.runtime.toml import read_table

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DRAIN_S = ServerOptions().drain_timeout_s


def documents(name: str) -> dict[str, Any]:
    """The objects of a manifest by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all((DEPLOY / name).read_text(encoding="utf-8"))}


def pod() -> Any:
    return documents("kubernetes.yaml")["Deployment"]["spec"]["template"]["spec"]


def test_the_deployment_probes_what_the_server_has() -> None:
    (container,) = pod()["containers"]
    assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http"}
    assert container["livenessProbe"]["httpGet"] == container["startupProbe"]["httpGet"] == {"path": "/health", "port": "http"}
    assert [port["name"] for port in container["ports"]] == ["http"] and container["ports"][0]["containerPort"] == 8000
    assert container["args"][:2] == ["serve", "/engine"]
    context_options = {option_name(option) for option in all_options()}
    for variable in container["env"]:
        name = variable["name"].removeprefix("BELLE_SERVE_").replace("_", "-").lower()
        assert name in context_options


def test_the_deployment_waits_for_a_drain() -> None:
    spec, (container,) = pod(), pod()["containers"]
    drain_s = float(container["args"][container["args"].index("--drain-timeout") + 1])
    pause_s = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert spec["terminationGracePeriodSeconds"] >= pause_s + drain_s + 15
    strategy = documents("kubernetes.yaml")["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxUnavailable": 0, "maxSurge": 1}


def test_the_deployment_has_its_memory_and_no_rights() -> None:
    spec, (container,) = pod(), pod()["containers"]
    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"]
    assert spec["securityContext"]["runAsNonRoot"] and container["securityContext"]["readOnlyRootFilesystem"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    names = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == names


def test_the_objects_of_the_deployment_go_together() -> None:
    found = documents("kubernetes.yaml")
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["spec"]["replicas"] > 1
    assert found["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels


def test_the_ray_service_has_an_application_that_fits() -> None:
    spec = documents("rayservice.yaml")["RayService"]["spec"]
    (application,) = yaml.safe_load(spec["serveConfigV2"])["applications"]
    assert application["import_path"] == "belle_compile.runtime.scale_out.application:app"
    arguments = Arguments.from_plain(application["args"])
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    (worker,) = group["template"]["spec"]["containers"]
    assert arguments.options.bounds == (group["minReplicas"], group["maxReplicas"])
    assert float(worker["resources"]["requests"]["cpu"]) >= arguments.options.cpus
    assert arguments.engine in [mount["mountPath"] for mount in worker["volumeMounts"]]
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.M)
    assert pinned and spec["rayClusterConfig"]["rayVersion"] == pinned[1]


def unit() -> RawConfigParser:
    parser = RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(DEPLOY / "belle-run.service", encoding="utf-8")
    return parser


def test_the_unit_drains_and_is_hardened() -> None:
    service = unit()["Service"]
    assert service["KillMode"] == "mixed" and service["KillSignal"] == "SIGTERM", "a second signal would end the drain"
    assert float(service["TimeoutStopSec"]) >= DRAIN_S + 15
    assert service["NoNewPrivileges"] == service["DynamicUser"] == "yes" and service["ProtectSystem"] == "strict"
    program, command, engine, *options = shlex.split(service["ExecStart"])
    assert (Path(program).name, command, options[0]) == ("belle-run", "serve", "--config")
    parse_serve(engine, [])


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_the_unit_is_one_that_systemd_takes(tmp_path: Path) -> None:
    text = (DEPLOY / "belle-run.service").read_text(encoding="utf-8").replace("/opt/belle/bin/belle-run", "/bin/true")
    path = tmp_path / "belle-run.service"
    path.write_text(text, encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(path)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_image_is_of_the_runtime() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    stages = text.split("\nFROM ")[1:]
    assert len(stages) == 2 and "pip install" not in stages[1]
    assert "EXTRAS=serve,redis\n" in stages[0] and "-c constraints.txt" in stages[0]
    assert re.search(r"^USER \d+$", stages[1], re.M) and "HEALTHCHECK" in stages[1] and "/health" in stages[1]
    context = (DEPLOY / "Dockerfile.dockerignore").read_text(encoding="utf-8")
    copied = {path for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M) for path in line.split()}
    assert {line[1:] for line in context.splitlines() if line.startswith("!")} == copied
    assert all((ROOT / path).exists() for path in copied)


def test_the_configuration_of_the_page_fits(tmp_path: Path) -> None:
    page = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```toml\n(.*?)```", page, re.S)
    path = tmp_path / "serve.toml"
    path.write_text(block, encoding="utf-8")
    known = {option_name(option) for option in all_options()}
    assert set(read_table(path, "test")) <= known
