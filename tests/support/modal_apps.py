# ruff: noqa: N802 - the methods are named as in the service definitions
"""Deployed apps in the stand-in for Modal: what the control plane keeps of them, on the definitions of Modal's own wheel."""

import itertools
import time

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as api
from modal_rpc import rpc
from modal_web import Site


class App:
    def __init__(self, number, name, tags):
        self.id, self.name, self.tags = f"ap-{number:022d}", name, dict(tags)
        self.created, self.stopped, self.deployed = time.time(), False, False
        self.functions, self.site = {}, None

    @property
    def state(self):
        return api.APP_STATE_STOPPED if self.stopped else api.APP_STATE_DEPLOYED


class Shelf:
    """What has been uploaded and made: by id, and by name where it has one."""

    def __init__(self, secrets):
        self.numbers = itertools.count(1)
        self.apps, self.functions, self.mounts, self.files, self.data, self.volumes = ({} for _ in range(6))
        self.secrets = {f"st-{name}": {} for name in secrets}

    def number(self):
        return next(self.numbers)

    def app(self, app_id):
        if app_id not in self.apps:
            raise GRPCError(Status.NOT_FOUND, f"App '{app_id}' not found")
        return self.apps[app_id]

    def deployed(self, name):
        return next((app for app in self.apps.values() if app.name == name and app.deployed and not app.stopped), None)


def described(function):
    """What a test wants to know of a function: nothing of its secrets but their keys."""
    scaling, gpu = function.autoscaler_settings, function.resources.gpu_config
    return {
        "module": function.module_name, "function": function.implementation_name, "gpu": f"{gpu.gpu_type}:{gpu.count}",
        "timeout": function.timeout_secs, "startup_timeout": function.startup_timeout_secs,
        "scaledown_window": scaling.scaledown_window, "min_containers": scaling.min_containers,
        "max_containers": scaling.max_containers, "max_inputs": function.max_concurrent_inputs,
        "web_port": function.webhook_config.web_server_port, "volumes": [one.mount_path for one in function.volume_mounts],
    }  # fmt: skip


class Apps:
    """The part of the control plane that deploys, lists and stops."""

    @rpc
    def AppGetByDeploymentName(self, request):
        app = self.world.shelf.deployed(request.name)
        return api.AppGetByDeploymentNameResponse(app_id=app.id if app else "")

    @rpc
    def AppCreate(self, request):
        return api.AppCreateResponse(app_id=self.new_app(request.description, request.tags).id)

    def new_app(self, name, tags=()):
        app = App(self.world.shelf.number(), name, tags)
        self.world.shelf.apps[app.id] = app
        return app

    @rpc
    def AppGetOrCreate(self, request):
        self.world.note("app", name=request.app_name)
        app = self.world.shelf.deployed(request.app_name)
        if app is None and not request.object_creation_type:
            raise GRPCError(Status.NOT_FOUND, f"App '{request.app_name}' not found in environment 'main'")
        if app is None:
            app = self.new_app(request.app_name)
            app.deployed = True
        return api.AppGetOrCreateResponse(app_id=app.id)

    @rpc
    def AppGetLayout(self, request):
        return api.AppGetLayoutResponse(
            app_layout=api.AppLayout(function_ids=self.world.shelf.app(request.app_id).functions)
        )

    @rpc
    def AppHeartbeat(self, request):
        return Empty()

    @rpc
    def AppClientDisconnect(self, request):
        return Empty()

    @rpc
    async def AppPublish(self, request):
        shelf = self.world.shelf
        app = shelf.app(request.app_id)
        if app.site:
            await app.site.close()
        app.name, app.deployed, app.functions = request.name, True, dict(request.function_ids)
        app.tags.update(request.tags)
        (function,) = (shelf.functions[one] for one in app.functions.values())
        files = {
            name: shelf.files[digest] for each in function.mount_ids for name, digest in shelf.mounts[each].items()
        }
        variables = {name: value for each in function.secret_ids for name, value in shelf.secrets[each].items()}
        app.site = Site(self.world, app.name, function, files, variables)
        await app.site.open()
        self.world.note(
            "deploy", name=app.name, tags=app.tags, variables=sorted(variables), files=sorted(files), url=app.site.url,
            secrets=[each for each in function.secret_ids if not shelf.secrets[each]], **described(function),
        )  # fmt: skip
        return api.AppPublishResponse(url=f"{self.world.url}/apps/{app.name}", deployed_at=time.time())

    @rpc
    def AppList(self, request):
        def metadata(app):
            lifecycle = api.AppLifecycle(app_state=app.state, created_at=app.created)
            return api.AppHandleMetadata(description=app.name, app_id=app.id, lifecycle=lifecycle)

        return api.AppListResponse(
            apps=[
                api.AppListResponse.AppListItem(
                    app_id=app.id, description=app.name, name=app.name, state=app.state, created_at=app.created,
                    metadata=metadata(app),
                )
                for app in self.world.shelf.apps.values() if app.deployed
            ]
        )  # fmt: skip

    @rpc
    def AppGetTags(self, request):
        return api.AppGetTagsResponse(tags=self.world.shelf.app(request.app_id).tags)

    @rpc
    def AppSetTags(self, request):
        app = self.world.shelf.app(request.app_id)
        app.tags = dict(request.tags)
        self.world.note("tags", name=app.name, tags=app.tags)
        return Empty()

    @rpc
    async def AppStop(self, request):
        app = self.world.shelf.app(request.app_id)
        app.stopped = True
        if app.site:
            await app.site.close()
        self.world.note("stop", name=app.name)
        return Empty()

    @rpc
    def AppFetchLogs(self, request):
        site = self.world.shelf.app(request.app_id).site
        text = site.log() if site else ""
        items = [
            api.TaskLogs(data=line, file_descriptor=api.FILE_DESCRIPTOR_STDOUT, timestamp=time.time() - 1)
            for line in text.splitlines(keepends=True)[-request.limit :]
        ]
        return api.AppFetchLogsResponse(batches=[api.TaskLogsBatch(items=items)])

    @rpc
    def MountBatchedCheckExistence(self, request):
        missing = [digest for digest in request.sha256_hex_hashes if digest not in self.world.shelf.files]
        return api.MountBatchedCheckExistenceResponse(missing_sha256_hex_hashes=missing)

    @rpc
    def MountPutFile(self, request):
        self.world.shelf.files[request.sha256_hex] = request.data
        return api.MountPutFileResponse(exists=True)

    @rpc
    def MountGetOrCreate(self, request):
        mount_id = f"mo-{self.world.shelf.number()}"
        self.world.shelf.mounts[mount_id] = {file.filename: file.sha256_hex for file in request.files}
        metadata = api.MountHandleMetadata(content_checksum_sha256_hex=mount_id)
        return api.MountGetOrCreateResponse(mount_id=mount_id, handle_metadata=metadata)

    @rpc
    def SecretGetOrCreate(self, request):
        secrets, name = self.world.shelf.secrets, request.deployment_name
        if not name:
            secret_id = f"st-{self.world.shelf.number()}"
            secrets[secret_id] = dict(request.env_dict)
            return api.SecretGetOrCreateResponse(secret_id=secret_id)
        if f"st-{name}" not in secrets:
            raise GRPCError(Status.NOT_FOUND, f"Secret '{name}' not found in environment 'main'")
        return api.SecretGetOrCreateResponse(secret_id=f"st-{name}")

    @rpc
    def VolumeGetOrCreate(self, request):
        return api.VolumeGetOrCreateResponse(volume_id=f"vo-{request.deployment_name}", version=1)

    @rpc
    async def VolumeListFiles(self, request):
        found = self.world.shelf.volumes.get(request.volume_id, {})
        yield api.VolumeListFilesResponse(
            entries=[api.FileEntry(path=path, type=api.FileEntry.FILE) for path in found if "/" not in path]
        )

    @rpc
    def VolumePutFiles(self, request):
        shelf = self.world.shelf
        held = shelf.volumes.setdefault(request.volume_id, {})
        for file in request.files:
            held[file.filename.lstrip("/")] = shelf.files[file.sha256_hex]
        self.world.note("upload", name=request.volume_id, files=sorted(file.filename for file in request.files))
        return Empty()

    @rpc
    def FunctionPrecreate(self, request):
        function_id = request.existing_function_id or f"fu-{self.world.shelf.number()}"
        metadata = api.FunctionHandleMetadata(function_name=request.function_name)
        return api.FunctionPrecreateResponse(function_id=function_id, handle_metadata=metadata)

    @rpc
    def FunctionCreate(self, request):
        data = request.function_data
        function = request.function if request.HasField("function") else data.ranked_functions[0].function
        function_id = request.existing_function_id or f"fu-{self.world.shelf.number()}"
        self.world.shelf.functions[function_id] = function
        if not data.ranked_functions:
            ranked = api.FunctionData.RankedFunction(rank=0, function=function)
            data = api.FunctionData(ranked_functions=[ranked])
        self.world.shelf.data[function_id] = data
        metadata = api.FunctionHandleMetadata(
            function_name=function.function_name, function_type=function.function_type
        )
        return api.FunctionCreateResponse(
            function_id=function_id, function=function, function_data=data, handle_metadata=metadata
        )

    @rpc
    def FunctionGet(self, request):
        app = self.world.shelf.deployed(request.app_name)
        if app is None or request.object_tag not in app.functions:
            raise GRPCError(
                Status.NOT_FOUND,
                f"Lookup failed for Function '{request.object_tag}' from the '{request.app_name}' app: not found",
            )
        function_id = app.functions[request.object_tag]
        function = self.world.shelf.functions[function_id]
        metadata = api.FunctionHandleMetadata(
            function_name=function.function_name, function_type=function.function_type, web_url=app.site.url
        )
        return api.FunctionGetResponse(
            function_id=function_id, handle_metadata=metadata, function=self.world.shelf.data[function_id]
        )
