"""serving/deploy: every file against the schema of what reads it, against the others, and against a running server.

The stock server is no package, so its command line is run by the embedded one, which has its flags, its configuration
files and its metrics.  `promtool` (Debian: prometheus) and `kubectl` are used where they are installed.
"""

import base64
import json
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path

import httpx
import jsonschema
import kubernetes_validate
import promql_parser
import pytest
import yaml
from google.protobuf import text_format

from course.core.catalogue import ROOT
from course.core.errors import InputError
from serving import canary, pipeline
from serving.server import spawn
from serving.server.settings import read_batching, read_metrics_path, read_model_config
from tests import serving_models
from tests.support import KUBERNETES, StrictLoader, changed, documents

DEPLOY = ROOT / "serving" / "deploy"
SCHEMAS = ROOT / "tests" / "data" / "schemas"
CONFIG_FOLDER = "/etc/tensorflow-serving/"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
MONITORING = DEPLOY / "monitoring"

# The stock server's flags: model_servers/main.cc of TensorFlow Serving.
STOCK_FLAGS = {
    "port", "grpc_socket_path", "rest_api_port", "rest_api_num_threads", "rest_api_timeout_in_ms",
    "rest_api_enable_cors_support", "enable_batching", "allow_version_labels_for_unavailable_models",
    "batching_parameters_file", "enable_per_model_batching_parameters", "model_config_file",
    "model_config_file_poll_wait_seconds", "model_name", "model_base_path", "num_load_threads",
    "num_unload_threads", "max_num_load_retries", "load_retry_interval_micros", "file_system_poll_wait_seconds",
    "flush_filesystem_caches", "tensorflow_session_parallelism", "tensorflow_session_config_file",
    "tensorflow_intra_op_parallelism", "tensorflow_inter_op_parallelism", "use_alts_credentials",
    "ssl_config_file", "platform_config_file", "per_process_gpu_memory_fraction", "saved_model_tags",
    "grpc_channel_arguments", "grpc_max_threads", "enable_model_warmup", "num_request_iterations_for_warmup",
    "version", "monitoring_config_file", "remove_unused_fields_from_bundle_metagraph", "prefer_tflite_model",
    "num_tflite_pools", "num_tflite_interpreters_per_pool", "enable_signature_method_name_check",
    "xla_cpu_compilation_enabled", "enable_profiler", "thread_pool_factory_config_file",
}  # fmt: skip

# The stock server's metrics that we use, and their labels: servables/tensorflow/util.cc and saved_model_warmup_util.cc,
# batching/batching_session.cc and batching_util.h of TensorFlow Serving, cc/saved_model/loader.cc of TensorFlow.
BATCHING = ":tensorflow:serving:batching_session:"
COUNTERS = {
    ":tensorflow:serving:request_count": {"model_name", "status"},
    ":tensorflow:cc:saved_model:load_attempt_count": {"model_path", "status"},
    ":tensorflow:cc:saved_model:load_latency": {"model_path"},
}
HISTOGRAMS = {
    ":tensorflow:serving:request_latency": {"model_name", "API", "entrypoint"},
    ":tensorflow:serving:runtime_latency": {"model_name", "API", "runtime"},
    ":tensorflow:serving:model_warmup_latency": {"model_path", "status"},
    BATCHING + "queuing_latency": {"thread_pool_name"},
    BATCHING + "input_batch_size": set(),
    BATCHING + "processed_batch_size": set(),
    BATCHING + "padding_size": {"execution_batch_size"},
}
STOCK_METRICS = COUNTERS | {
    name + part: labels | ({"le"} if part == "_bucket" else set())
    for name, labels in HISTOGRAMS.items()
    for part in ("_bucket", "_sum", "_count")
}
SCRAPED = {"job", "instance", "app_kubernetes_io_name"}  # labels that a scrape adds to every metric


# --- reading ----------------------------------------------------------------------------------------------------------


def manifest(kind, name="tensorflow-serving"):
    """The Kubernetes manifest of that kind and name."""
    (found,) = (
        document
        for path in MANIFESTS
        for document in documents(path)
        if (document["kind"], document["metadata"]["name"]) == (kind, name)
    )
    return found


def dockerfile():
    """[(instruction, its text)] of the Dockerfile, continued lines joined."""
    text = re.sub(r"\\\n\s*", "", re.sub(r"^#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE))
    return [tuple(line.split(None, 1)) for line in text.splitlines() if line.strip()]


def arguments(instruction):
    """The one JSON list that follows an instruction (after HEALTHCHECK's options and CMD)."""
    (text,) = (rest for name, rest in dockerfile() if name == instruction)
    return json.loads(text[text.index("[") :])


def flags(words):
    """{flag: value} of a command line."""
    assert all(word.startswith("--") and "=" in word for word in words), words
    return dict(word.removeprefix("--").split("=", 1) for word in words)


def container():
    """The container of the Deployment."""
    (only,) = manifest("Deployment")["spec"]["template"]["spec"]["containers"]
    return only


def models_served():
    return [config.name for config in read_model_config(DEPLOY / "config" / "models.config").model_config_list.config]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The embedded server, started by the Dockerfile's command line over a small model, and asked a few things."""
    folder = tmp_path_factory.mktemp("deploy")
    config = folder / "config"
    shutil.copytree(DEPLOY / "config", config)
    models = read_model_config(config / "models.config")
    for model in models.model_config_list.config:
        model.base_path = str(folder / model.base_path.lstrip("/"))
        serving_models.save_graph(Path(model.base_path) / "1", serving_models.half_plus())
    (config / "models.config").write_text(text_format.MessageToString(models))
    given = flags(arguments("CMD"))
    del given["port"], given["rest_api_port"]  # any free ones
    given = {name: value.replace(CONFIG_FOLDER, f"{config}/") for name, value in given.items()}
    with spawn(models_served()[0], **given) as running:
        running.wait_available()
        path = f"{running.url}/v1/models/{running.model_name}:predict"
        assert httpx.post(path, json={"instances": [[1.0]]}).json() == {"predictions": [[2.5]]}
        assert httpx.post(path, json={"instances": "?"}).status_code == 400
        yield running


def test_every_file_is_plain_yaml():
    files = [path for path in DEPLOY.rglob("*") if path.suffix in (".yaml", ".yml")]
    assert len(files) > 12 and all(documents(path) for path in files)
    with pytest.raises(yaml.YAMLError, match="twice in a mapping"):
        yaml.load("a: {b: 1, b: 2}", StrictLoader)


# --- the server's own files -------------------------------------------------------------------------------------------


def test_configs_are_what_the_server_reads(tmp_path):
    config = DEPLOY / "config"
    (model,) = read_model_config(config / "models.config").model_config_list.config
    assert (model.name, model.base_path) == ("day25_vision_pipeline", "/models/day25_vision_pipeline")
    batching = read_batching(config / "batching.config")
    assert (batching.max_batch_size, batching.max_enqueued_batches, batching.num_batch_threads) == (64, 100, 2)
    assert read_metrics_path(config / "monitoring.config") == "/monitoring/prometheus/metrics"
    for name, read in (
        ("models.config", read_model_config),
        ("batching.config", read_batching),
        ("monitoring.config", read_metrics_path),
    ):
        wrong = tmp_path / name
        wrong.write_text((config / name).read_text() + "\nno_such_field: 1\n")
        with pytest.raises(InputError, match="no_such_field"):
            read(wrong)


def dockerfile_faults(instructions):
    """What is wrong with the Dockerfile's instructions."""
    faults = []
    known = {"ARG", "FROM", "COPY", "USER", "EXPOSE", "ENTRYPOINT", "CMD", "HEALTHCHECK"}
    faults += [f"unknown instruction {name}" for name, _ in instructions if name not in known]
    tag = next(rest.split("=")[1] for name, rest in instructions if name == "ARG")
    faults += [] if re.fullmatch(r"\d+\.\d+\.\d+", tag) else [f"{tag} is no version"]
    ignored = (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
    for name, rest in instructions:
        if name == "COPY":
            source = next(word for word in rest.split() if not word.startswith("--")).rstrip("/")
            if f"!{source}" not in ignored:
                faults.append(f"{source} does not reach the builder")
            if source != "exports" and not (ROOT / source).exists():
                faults.append(f"{source} does not exist")
        if name == "CMD":
            words = flags(json.loads(rest))
            faults += [f"--{flag} is no flag of the stock server" for flag in words.keys() - STOCK_FLAGS]
            files = [value for value in words.values() if value.startswith(CONFIG_FOLDER)]
            faults += [f"{file} is not there" for file in files if not (DEPLOY / "config" / Path(file).name).is_file()]
    users = [rest for name, rest in instructions if name == "USER"]
    return faults + ([] if users == ["65532:65532"] else [f"it runs as {users}"])


def test_the_dockerfile():
    instructions = dockerfile()
    assert dockerfile_faults(instructions) == []
    wrong = [
        (name, rest.replace("--enable_batching", "--batching").replace("serving/deploy/config/", "config/"))
        for name, rest in instructions
        if name != "USER"
    ]
    assert dockerfile_faults(wrong) == [
        "config does not reach the builder", "config does not exist", "--batching is no flag of the stock server",
        "it runs as []",
    ]  # fmt: skip
    assert arguments("ENTRYPOINT") == container()["command"] == ["/usr/bin/tensorflow_model_server"]
    assert arguments("HEALTHCHECK") == ["/usr/local/bin/healthcheck", flags(arguments("CMD"))["rest_api_port"],
                                        *models_served()]  # fmt: skip


def test_the_health_check(server):
    """The image's check, run where there is bash, against a server that is well, lacks a model, or is gone."""

    def check(port, *models):
        command = ["bash", DEPLOY / "healthcheck.sh", str(port), *models]
        return subprocess.run(command, capture_output=True, text=True, timeout=10)

    port = httpx.URL(server.url).port
    assert check(port, server.model_name).returncode == 0
    missing = check(port, server.model_name, "no_such_model")
    assert (missing.returncode, missing.stdout) == (1, "no_such_model: HTTP status 404\n")
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert check(port, server.model_name).returncode != 0


# --- compose ----------------------------------------------------------------------------------------------------------


def compose_errors(document):
    """What the Compose Specification's schema refuses."""
    schema = json.loads((SCHEMAS / "compose.schema.json").read_text())
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(document)]


def test_compose():
    (compose,) = documents(DEPLOY / "compose.yaml")
    assert compose_errors(compose) == []
    assert compose_errors(changed(compose, "services", "server", "restart_policy", value="always"))
    assert compose_errors(changed(compose, "services", "server", "cap_drop", value="ALL"))
    for name, service in compose["services"].items():
        assert service.get("profiles", []) == ([] if name == "server" else ["monitoring"])
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        # ${NAME:-default}
        sources = [re.sub(r"\$\{\w+:-(.*?)\}", r"\1", volume).split(":")[0] for volume in service["volumes"]]
        for source in sources:
            path = (DEPLOY / source).resolve()
            assert path.exists() or path == ROOT / "exports" or source in compose["volumes"], source
        if "build" not in service:
            assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+", service["image"])
    build = compose["services"]["server"]["build"]
    assert (DEPLOY / build["context"]).resolve() == ROOT
    assert (ROOT / build["dockerfile"]).is_file()
    stages = [rest.split(" AS ")[1] for name, rest in dockerfile() if name == "FROM"]
    assert build["target"] in stages
    # The image's command, and the Deployment's threads: a limit of as many CPUs holds for both.
    limit = compose["services"]["server"]["deploy"]["resources"]["limits"]["cpus"]
    assert limit == container()["resources"]["limits"]["cpu"]
    words = {name: value.replace("$(CPUS)", limit) for name, value in flags(container()["args"]).items()}
    assert flags(compose["services"]["server"]["command"]) == words


# --- Kubernetes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_manifests_are_valid(path, version):
    for document in documents(path):
        assert kubernetes_validate.validate(document, version, strict=True) == version


def test_a_wrong_manifest_is_refused():
    deployment = manifest("Deployment")
    here = "spec", "template", "spec", "containers", 0
    for path, value in (
        ((*here, "readinessProb"), {}),  # unknown field
        ((*here, "livenessProbe", "periodSeconds"), "10"),  # wrong type
        (("spec",), {"template": deployment["spec"]["template"]}),  # no selector
    ):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(changed(deployment, *path, value=value), KUBERNETES[-1], strict=True)


def test_manifests_fit_together():
    deployment, server = manifest("Deployment"), container()
    pod = deployment["spec"]["template"]
    labels = pod["metadata"]["labels"]
    assert "replicas" not in deployment["spec"]  # the autoscaler's
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert manifest("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"] == {
        "apiVersion": deployment["apiVersion"],
        "kind": "Deployment",
        "name": deployment["metadata"]["name"],
    }
    for kind in ("PodDisruptionBudget", "NetworkPolicy"):
        spec = manifest(kind)["spec"]
        assert (spec.get("selector") or spec["podSelector"])["matchLabels"].items() <= labels.items()
    for constraint in pod["spec"]["topologySpreadConstraints"]:
        assert constraint["labelSelector"]["matchLabels"].items() <= labels.items()
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    for name in ("tensorflow-serving", "tensorflow-serving-pods"):
        spec = manifest("Service", name)["spec"]
        assert spec["selector"].items() <= labels.items()
        assert all(ports[port["targetPort"]] == port["port"] for port in spec["ports"])
    for rule in manifest("NetworkPolicy")["spec"]["ingress"]:
        assert {port["port"] for port in rule["ports"]} <= ports.keys()
    push = manifest("Pod", "model-push")
    assert push["metadata"]["labels"].items().isdisjoint(labels.items())  # no service sends it requests
    assert {mount["name"] for mount in server["volumeMounts"]} == {volume["name"] for volume in pod["spec"]["volumes"]}
    claim = manifest("PersistentVolumeClaim", "models")["metadata"]["name"]
    for spec in (pod["spec"], push["spec"]):
        (volume,) = (volume for volume in spec["volumes"] if volume["name"] == "models")
        assert volume["persistentVolumeClaim"]["claimName"] == claim
    (kustomization,) = documents(DEPLOY / "kustomization.yaml")
    (config,) = (volume["configMap"]["name"] for volume in pod["spec"]["volumes"] if volume["name"] == "config")
    assert [config] == [generated["name"] for generated in kustomization["configMapGenerator"]]


def test_the_deployment_runs_what_the_dockerfile_runs():
    words = flags(container()["args"])
    image = flags(arguments("CMD"))
    assert words.keys() <= STOCK_FLAGS
    assert image.items() <= words.items()
    tag = next(rest.split("=")[1] for name, rest in dockerfile() if name == "ARG")
    assert container()["image"] == f"tensorflow/serving:{tag}"
    (mount,) = (mount["mountPath"] for mount in container()["volumeMounts"] if mount["name"] == "config")
    assert mount + "/" == CONFIG_FOLDER
    batching = read_batching(DEPLOY / "config" / "batching.config")
    assert container()["resources"]["limits"]["cpu"] == str(batching.num_batch_threads)
    # Time to end: until no more requests are sent here, then the longest that one may take.
    pod = manifest("Deployment")["spec"]["template"]["spec"]
    stop = int(container()["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] >= stop + 30  # the default of --rest_api_timeout_in_ms


def test_what_the_cluster_asks_is_answered(server):
    """The probes' paths and the scraped one, on a running server; the ports by the names that the manifest gives."""
    served = {"rest": httpx.URL(server.url).port, "grpc": int(server.grpc_target.split(":")[1])}
    for name in ("startupProbe", "readinessProbe"):
        probe = container()[name]["httpGet"]
        assert probe["path"] == f"/v1/models/{server.model_name}/metadata"
        assert httpx.get(f"http://127.0.0.1:{served[probe['port']]}{probe['path']}").status_code == 200
    with socket.create_connection(("127.0.0.1", served[container()["livenessProbe"]["tcpSocket"]["port"]])):
        pass
    annotations = manifest("Deployment")["spec"]["template"]["metadata"]["annotations"]
    ports = {str(port["containerPort"]): port["name"] for port in container()["ports"]}
    path = annotations["prometheus.io/path"]
    page = httpx.get(f"http://127.0.0.1:{served[ports[annotations['prometheus.io/port']]]}{path}")
    assert page.status_code == 200
    assert "# TYPE :tensorflow:serving:request_count counter" in page.text
    (prometheus,) = documents(MONITORING / "prometheus.yml")
    assert [job["metrics_path"] for job in prometheus["scrape_configs"]] == [path]


def test_kustomization():
    (kustomization,) = documents(DEPLOY / "kustomization.yaml")
    assert kustomization.keys() == {"apiVersion", "kind", "resources", "configMapGenerator", "labels"}
    resources = {DEPLOY / resource for resource in kustomization["resources"]}
    assert resources == set(MANIFESTS) - {DEPLOY / "kubernetes" / "model-push.yaml"}
    (generated,) = kustomization["configMapGenerator"]
    assert {DEPLOY / file for file in generated["files"]} == set((DEPLOY / "config").glob("*.config"))


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl is not installed")
def test_kustomize_builds_it(tmp_path):
    def build(folder):
        return subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True, timeout=60)

    built = build(DEPLOY)
    assert built.returncode == 0, built.stderr
    made = list(yaml.load_all(built.stdout, StrictLoader))
    for document in made:
        kubernetes_validate.validate(document, KUBERNETES[-1], strict=True)
    (config,) = (document for document in made if document["kind"] == "ConfigMap")
    assert config["metadata"]["name"] == "tensorflow-serving"
    assert config["data"] == {path.name: path.read_text() for path in (DEPLOY / "config").glob("*.config")}
    shutil.copytree(DEPLOY, tmp_path / "deploy")
    (tmp_path / "deploy" / "config" / "batching.config").unlink()
    assert "batching.config" in build(tmp_path / "deploy").stderr


# --- KServe -----------------------------------------------------------------------------------------------------------


def kserve_errors(service):
    """What KServe's schema refuses, and Kubernetes' where the fields are those of a pod or a container."""
    schema = json.loads((SCHEMAS / "inferenceservice.schema.json").read_text())
    errors = [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(service)]
    if errors:
        return errors
    predictor = service["spec"]["predictor"]
    parts = schema["definitions"]

    def of_kubernetes(definition, values):
        return {key: value for key, value in values.items() if "$comment" in str(parts[definition]["properties"][key])}

    server = {"name": "kserve-container", **of_kubernetes("V1beta1ModelSpec", predictor["model"])}
    pod = of_kubernetes("V1beta1PredictorSpec", predictor) | {"containers": [server]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": service["metadata"], "spec": pod}
    try:
        kubernetes_validate.validate(pod, KUBERNETES[-1], strict=True)
    except kubernetes_validate.ValidationError as error:
        errors.append(error.message)
    return errors


def test_inferenceservice():
    (service,) = documents(DEPLOY / "kserve" / "inferenceservice.yaml")
    assert kserve_errors(service) == []
    here = "spec", "predictor"
    assert kserve_errors(changed(service, *here, "canaryTrafficPercent", value=10)) == []
    for path, value in (
        (("spec", "canaryTrafficPercent"), 10),  # of the predictor, not of the service
        ((*here, "canaryTrafficPercent"), "10%"),
        ((*here, "model", "modelFormat"), "tensorflow"),
        ((*here, "model", "resources", "limit"), {"cpu": "1"}),  # Kubernetes': limits
        ((*here, "volumes", 0, "configMap", "named"), "x"),
    ):
        assert kserve_errors(changed(service, *path, value=value)), path
    predictor = service["spec"]["predictor"]
    assert container()["image"] == f"tensorflow/serving:{predictor['model']['runtimeVersion']}"
    assert flags(predictor["model"]["args"]).items() <= flags(container()["args"]).items()
    assert predictor["annotations"]["prometheus.io/path"] == read_metrics_path(DEPLOY / "config" / "monitoring.config")
    assert re.fullmatch(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?", service["metadata"]["name"])  # part of a host name


# --- Prometheus and Grafana -------------------------------------------------------------------------------------------


def query_faults(expression, metrics):
    """What is wrong with a PromQL query: it does not parse, or asks for metrics or labels that are not there."""
    try:
        tree = promql_parser.parse(expression)
    except ValueError as error:
        return [f"{error}: {expression}"]
    faults = []

    def visit(node):
        if isinstance(node, promql_parser.VectorSelector):
            if node.name not in metrics:
                faults.append(f"no metric {node.name}")
            else:
                wanted = {matcher.name for matcher in node.matchers.matchers}
                faults.extend(f"{node.name} has no label {name}" for name in wanted - metrics[node.name] - SCRAPED)
        if isinstance(node, promql_parser.AggregateExpr) and node.modifier is not None:
            inside = [metrics.get(name, set()) for name in selected(node.expr)]
            faults.extend(
                f"by ({name}): no metric in the sum has that label"
                for name in node.modifier.labels
                if not any(name in labels | SCRAPED for labels in inside)
            )
        return True

    promql_parser.walk(tree, visit)
    return faults


def selected(tree):
    """The names of the metrics in a query."""
    names = []
    promql_parser.walk(
        tree, lambda node: names.append(node.name) if isinstance(node, promql_parser.VectorSelector) else None
    )
    return names


def rule_faults(document):
    """What is wrong with a file of rules."""
    faults, metrics, names = [], STOCK_METRICS | {"up": set()}, []
    for group in document["groups"]:
        faults += [f"unknown key {key}" for key in group.keys() - {"name", "interval", "rules"}]
        for rule in group["rules"]:
            kind = "record" if "record" in rule else "alert"
            keys = {"expr", kind} | ({"for", "labels", "annotations"} if kind == "alert" else set())
            faults += [f"{rule[kind]}: unknown key {key}" for key in rule.keys() - keys]
            faults += [f"{rule[kind]}: {fault}" for fault in query_faults(rule["expr"], metrics)]
            if "for" in rule:
                promql_parser.parse_duration(rule["for"])
            if kind == "record":  # its labels are those of the first aggregation, or of the query's only metric
                assert re.fullmatch(r"[a-z_]+:tensorflow_serving_[a-z_]+:[a-z0-9_]+", rule["record"])
                by = re.search(r"by \(([^)]*)\)", rule["expr"])
                metrics = metrics | {rule["record"]: set(by[1].split(", ")) - {"le"}}
            elif (
                rule.get("labels", {}).get("severity") not in ("page", "ticket") or "summary" not in rule["annotations"]
            ):
                faults.append(f"{rule[kind]}: no severity, or no summary")
            names.append(rule[kind])
    return faults + [f"{name} twice" for name in set(names) if names.count(name) > 1]


def test_rules():
    (rules,) = documents(MONITORING / "rules.yml")
    assert rule_faults(rules) == []
    here = "groups", 0, "rules", 0
    for path, value, fault in (
        ((*here, "expr"), "sum by (model_name) (rate(:tensorflow:serving:request_count))", "expected type"),
        ((*here, "expr"), "sum by (model) (rate(:tensorflow:serving:request_count[5m]))", "by (model)"),
        ((*here, "expr"), 'sum by (status) (:tensorflow:serving:request_count{code="200"})', "no label code"),
        ((*here, "expr"), "sum by (status) (tensorflow_serving_request_count)", "no metric"),
        ((*here, "for"), "5m", "unknown key"),
        (("groups", 1, "rules", 0, "labels"), {}, "no severity"),
    ):
        assert any(fault in found for found in rule_faults(changed(rules, *path, value=value))), (path, fault)


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed")
def test_promtool_agrees(tmp_path):
    def promtool(*words):
        return subprocess.run(["promtool", *words], capture_output=True, text=True, timeout=120)

    for command in (
        ("check", "config", MONITORING / "prometheus.yml"),
        ("test", "rules", MONITORING / "rules_test.yml"),
    ):
        ended = promtool(*command)
        assert ended.returncode == 0, ended.stdout + ended.stderr
    for name in ("rules.yml", "rules_test.yml"):
        shutil.copy(MONITORING / name, tmp_path)
    (tmp_path / "rules.yml").write_text((MONITORING / "rules.yml").read_text().replace("> 14.4 *", "> 144 *"))
    assert "TensorFlowServingFaultsFast" in promtool("test", "rules", tmp_path / "rules_test.yml").stderr


def test_every_alert_is_seen_to_ring_and_to_be_silent():
    tested = (MONITORING / "rules_test.yml").read_text()
    (rules,) = documents(MONITORING / "rules.yml")
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"] if "alert" in rule]
    assert alerts
    for alert in alerts:
        assert re.search(rf"alertname: {alert}\n\s+eval_time: \w+\n\s+exp_alerts", tested), alert
        assert re.search(rf"alertname: {alert}\n\s+eval_time: \w+\n(?!\s+exp_alerts)", tested), alert


def queries(dashboard):
    """Every query of a dashboard, Grafana's variables filled in."""
    for panel in dashboard["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")


def dashboard_faults(dashboard):
    """What is wrong with a Grafana dashboard."""
    faults = [fault for query in queries(dashboard) for fault in query_faults(query, STOCK_METRICS | {"up": set()})]
    variables = {variable["name"] for variable in dashboard["templating"]["list"]} | {"__rate_interval"}
    source = {"type": "prometheus", "uid": "${datasource}"}
    taken = set()
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])}
        if cells & taken or any(x >= 24 for x, _ in cells):
            faults.append(f"{panel['title']} lies over another panel, or beside the page")
        taken |= cells
        if panel["type"] == "row":
            continue
        if panel["type"] not in ("timeseries", "stat") or not panel["description"] or not panel["targets"]:
            faults.append(f"{panel['title']}: {panel['type']}, or no description or query")
        if any(place["datasource"] != source for place in [panel, *panel["targets"]]):
            faults.append(f"{panel['title']}: another data source")
        for target in panel["targets"]:
            used = set(re.findall(r"\$(\w+)", target["expr"]))
            faults += [f"{panel['title']}: no variable {name}" for name in used - variables]
            shown = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            kept = set(re.findall(r"\w+", " ".join(re.findall(r"by \(([^)]*)\)", target["expr"]))))
            whole = target["expr"] in STOCK_METRICS  # a metric as it is keeps all its labels
            faults += [f"{panel['title']}: the legend has no {name}" for name in shown - kept if not whole]
    idents = [panel["id"] for panel in dashboard["panels"]]
    return faults + (["an id twice"] if len(set(idents)) < len(idents) else [])


def test_the_dashboard():
    dashboard = json.loads((MONITORING / "dashboard.json").read_text())
    assert dashboard_faults(dashboard) == []
    panel = next(i for i, panel in enumerate(dashboard["panels"]) if panel["type"] == "timeseries")
    target = "panels", panel, "targets", 0
    for path, value, fault in (
        ((*target, "expr"), "sum(rate(:tensorflow:serving:requests[5m]))", "no metric"),
        ((*target, "expr"), "rate(up[$interval]", "unexpected character"),
        ((*target, "expr"), "up[$interval]", "no variable interval"),
        ((*target, "legendFormat"), "{{version}}", "the legend has no version"),
        (("panels", panel, "gridPos", "y"), 0, "over another panel"),
        (("panels", panel, "id"), 1, "an id twice"),
    ):
        assert any(fault in found for found in dashboard_faults(changed(dashboard, *path, value=value))), fault


def test_the_embedded_server_has_the_stock_metrics(server):
    """Of what the rules and the dashboard ask for the embedded server lacks at most the batching session's metrics."""
    page = httpx.get(f"{server.url}{read_metrics_path(DEPLOY / 'config' / 'monitoring.config')}").text
    shown = {}
    for name, labels in re.findall(r"^([a-z_:]+)\{(.*)\} \S+$", page, re.MULTILINE):
        shown.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    (rules,) = documents(MONITORING / "rules.yml")
    asked = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    asked += queries(json.loads((MONITORING / "dashboard.json").read_text()))
    wanted = {name for query in asked for name in selected(promql_parser.parse(query)) if name in STOCK_METRICS}
    lacking = wanted - shown.keys()
    assert {name for name in lacking if not name.startswith(BATCHING)} == set()
    assert {name: shown[name] for name in wanted - lacking} == {name: STOCK_METRICS[name] for name in wanted - lacking}
    assert re.search(r':tensorflow:serving:request_count\{model_name="\w+",status="INVALID_ARGUMENT"\} 1$', page, re.M)


def test_grafana_finds_its_files():
    (compose,) = documents(DEPLOY / "compose.yaml")
    mounted = dict(volume.split(":")[:2] for volume in compose["services"]["grafana"]["volumes"])
    (providers,) = documents(MONITORING / "grafana" / "dashboards.yaml")
    (provider,) = providers["providers"]
    assert Path(mounted["./monitoring/dashboard.json"]).parent == Path(provider["options"]["path"])
    (sources,) = documents(MONITORING / "grafana" / "datasource.yaml")
    (source,) = sources["datasources"]
    assert httpx.URL(source["url"]).host in compose["services"]  # by its name there
    (prometheus,) = documents(MONITORING / "prometheus.yml")
    (job,) = prometheus["scrape_configs"]
    assert source["jsonData"]["timeInterval"] == prometheus["global"]["scrape_interval"]
    assert job["static_configs"] == [{"targets": ["server:8501"]}]
    rules = mounted_as(compose, "prometheus", "./monitoring/rules.yml")
    config = mounted_as(compose, "prometheus", "./monitoring/prometheus.yml")
    assert rules.parent / prometheus["rule_files"][0] == rules and config.parent == rules.parent


def mounted_as(compose, service, source):
    """Where a service sees a file."""
    (target,) = (
        volume.split(":")[1] for volume in compose["services"][service]["volumes"] if volume.split(":")[0] == source
    )
    return Path(target)


# --- the README -------------------------------------------------------------------------------------------------------


def test_the_readme_names_what_is_there():
    text = (DEPLOY / "README.md").read_text()
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    paths = set(re.findall(r"serving/deploy(?:/[\w.-]+)*", "\n".join(blocks)))
    assert {path for path in paths if not (ROOT / path).exists()} == set()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (DEPLOY / link).exists(), link
    for block in blocks:
        for line in block.replace("\\\n", " ").splitlines():
            shlex.split(line, comments=True)
    commands = re.findall(r"python -m ([\w.]+)", text)
    assert commands and all((ROOT / (name.replace(".", "/") + ".py")).is_file() or
                            (ROOT / name.replace(".", "/")).is_dir() for name in commands)  # fmt: skip


def test_the_readmes_lines_write_requests_that_a_canary_reads(tmp_path):
    text = (DEPLOY / "README.md").read_text()
    (lines,) = re.findall(r"^find .*?> requests\.jsonl$", text, re.DOTALL | re.MULTILINE)
    folder = tmp_path / "runs" / "model" / "cpu-s0" / "raw" / "test" / "a class"
    folder.mkdir(parents=True)
    contents = [bytes([i]) * 100 for i in range(250)]
    for i, content in enumerate(contents):
        (folder / f"{i}.png").write_bytes(content)
    subprocess.run(["bash", "-c", "m=model\n" + lines], cwd=tmp_path, check=True, timeout=60)
    bodies = canary._bodies(tmp_path / "requests.jsonl")
    sent = {base64.b64decode(body["instances"][0]["b64"], validate=True) for body in bodies}
    assert len(bodies) == len(sent) == 200
    assert sent <= set(contents)


def test_what_the_readme_makes_of_a_version_taken_back_can_be_restored(tmp_path):
    (name,) = re.findall(r"/models/\$m/(withdrawn-[^`]+)`", (DEPLOY / "README.md").read_text())
    (tmp_path / "model").mkdir()
    subprocess.run(["bash", "-c", f"v=12; mkdir {name}"], cwd=tmp_path / "model", check=True, timeout=60)
    assert pipeline.restore(tmp_path / "model") == 12
    assert pipeline.versions(tmp_path / "model") == [12]
