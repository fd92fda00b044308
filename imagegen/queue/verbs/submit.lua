-- Enqueues tasks, or returns the records that exist.
--
-- Nothing is enqueued without the stream: Redis has lost it then, and with it records of tasks that may run.
--
-- The entry is added first, so that the record can name it. If the task exists, the entry is removed before any
-- consumer can read it. A new task costs two commands.
--
-- If a task has siblings, one command reads the records of the whole batch first: a new task is not enqueued if a
-- sibling has images, since it may need fewer calls then; and a task that exists costs no entry.
--
-- A task that waits in a line gets no entry (see line_args.lua), and costs as many commands. Whether the stream exists is
-- checked with the first task of a line: Redis can't lose records without the lines of their time.
--
-- The budgets reserve what all tasks of the batch may cost by one command, and take back what was not enqueued by
-- another. A task that exists costs nothing.
--
-- KEYS    1 stream; then the record of each task; then the records of the siblings, task by task; then the budgets of
--         each day
-- ARGV    1 group; 2 capacity of the stream; 3 its limit if the depth is to be measured, else ''; 4 life of a record in
--         ms; 5 highest schema version that is readable; 6 number of tasks; 7 number of days with budgets; 8 life of
--         budgets in s; 9 number of tasks in lines, which count for a task that is to wait in one;
--         then nine for each task: epoch, digest, entry JSON, record JSON, the epoch to replace, finished or without
--         an entry, or '' (a failed or cancelled task is always replaced) or 'images' (the same, unless it has
--         images), schema version, number of siblings, text of what budgets hold (see budget.lua), the same for the
--         epoch to replace if it is unfinished
-- result  depth or -1; then for each task a list: kind, entry id, epoch, existing record, records of siblings; then the
--         commands for budgets, and five for each value of a budget: see budget.lua; then the length of each line
--         kind: 'new', 'again' (it replaced an earlier epoch), 'known' (it exists), 'full', 'collision' (another
--         request has this id), 'newer' (of a later schema version), 'gone' (unfinished and without an entry),
--         'siblings' (these are completed, or failed or cancelled with images, as this task may be; nothing was
--         changed), 'budget' (over a budget), 'lost' (there is no stream)
local stream, capacity, depth, count = KEYS[1], tonumber(ARGV[2]), -1, tonumber(ARGV[6])
local days, budget_life, in_lines = tonumber(ARGV[7]), ARGV[8], tonumber(ARGV[9])
if ARGV[3] ~= '' then
  local pending = redis.pcall('XPENDING', stream, ARGV[1])
  depth = redis.call('XLEN', stream) - (pending.err and 0 or pending[1])
  capacity = tonumber(ARGV[3]) - depth
end

-- Returns whether the queue takes this task no more.
local function is_full(i) return capacity - (waits_in_line(i) and in_lines or 0) <= 0 end

-- Returns the entry of a task, or false without a stream.
local function add(i, version, epoch, entry_json)
  if waits_in_line(i) then return IN_LINE end
  return redis.call('XADD', stream, 'NOMKSTREAM', '*', 'v', version, 'g', epoch, 'd', entry_json)
end

-- Returns the record of a new epoch.
local function pending(version, entry, epoch, digest, record_json)
  return version .. ' pending ' .. entry .. ' ' .. epoch .. ' ' .. epoch .. ' ' .. digest .. '\n' .. record_json
end

local budgets = keys_of_days(days)
if days > 0 then reserve(budgets, budget_life, count, function(i) return ARGV[i * 9 + 8] end) end

local records = #KEYS - days > count + 1 and redis.call('MGET', unpack(KEYS, 2, #KEYS - days))
local next_sibling = count

-- Returns whether a record is of a task that failed or was cancelled, and has images.
local function ended_with_images(record)
  return (string.find(record, '^%d+ failed ') or string.find(record, '^%d+ cancelled '))
    and string.find(record, '"images":[{', 1, true)
end

-- Adds the records of finished siblings that may have images to a list, and returns whether there are any.
local function add_finished(list, siblings)
  local found = false
  for i = next_sibling + 1, next_sibling + siblings do
    local record = records[i]
    local version = record and string.match(record, '^(%d+) ')
    if version and tonumber(version) <= tonumber(ARGV[5])
      and (string.find(record, '^%d+ completed ') or ended_with_images(record)) then
      found, list[#list + 1] = true, record
    end
  end
  next_sibling = next_sibling + siblings
  return found
end

local ended = {} -- texts of the unfinished epochs that are replaced, by task
local before = {} -- by task in a line, the record that it has replaced, false for none

-- Adds a task to the line that it waits in, now that its record is written.
local function park_stored(i, version, epoch, digest, entry_json, record_json, existing)
  if not waits_in_line(i) then return end
  before[i] = type(existing) == 'string' and existing
  local id = string.match(KEYS[i + 1], '[^:]*$')
  add_to_line(i, element_of(version, epoch, digest, id, record_json, entry_json))
end

local function submit(i)
  local record, at = KEYS[i + 1], i * 9 + 1
  local epoch, digest, entry_json, record_json, replaced, version =
    ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], ARGV[at + 5]
  local with_siblings = {'siblings', '', epoch, ''}
  local has_finished = add_finished(with_siblings, tonumber(ARGV[at + 6]))
  local entry, existing
  local affordable = fits(i)
  if records then
    existing = records[i]
  elseif affordable and not is_full(i) then
    entry = add(i, version, epoch, entry_json)
    if not entry then return {'lost', '', '', ''} end
    existing = redis.pcall('SET', record, pending(version, entry, epoch, digest, record_json),
      'NX', 'GET', 'PX', ARGV[4])
    if not existing then
      park_stored(i, version, epoch, digest, entry_json, record_json)
      return {'new', entry, epoch, ''}
    end
    if entry ~= IN_LINE then redis.call('XDEL', stream, entry) end
  else
    existing = redis.pcall('GET', record)
  end
  local kind, has_own_images = 'new', false
  if existing then
    local existing_kind, new_epoch = judge(stream, existing, epoch, digest, replaced, ARGV[5])
    if existing_kind then return {existing_kind, '', epoch, type(existing) == 'table' and '' or existing} end
    kind, epoch = 'again', string.format('%.0f', new_epoch)
    has_own_images = replaced == 'images' and type(existing) == 'string' and ended_with_images(existing)
    if has_own_images then with_siblings[#with_siblings + 1] = existing end
  end
  if has_finished or has_own_images then return with_siblings end
  if not affordable then return {'budget', '', '', ''} end
  if is_full(i) then return {'full', '', '', ''} end
  entry = add(i, version, epoch, entry_json)
  if not entry then return {'lost', '', '', ''} end
  redis.call('SET', record, pending(version, entry, epoch, digest, record_json), 'PX', ARGV[4])
  park_stored(i, version, epoch, digest, entry_json, record_json, existing)
  if kind == 'again' and ARGV[at + 8] ~= '' then
    local state, _, their_epoch = string.match(existing, '^%d+ (%l+) (%S+) (%d+) ')
    local unfinished = state == 'pending' or state == 'processing'
    if unfinished and their_epoch == replaced then ended[i] = ARGV[at + 8] end
  end
  return {kind, entry, epoch, ''}
end

local results, lengths = {}, {}

-- Takes the tasks of a line back that did not exist before, if there is no stream.
local function withdraw_without_stream(line, client)
  if redis.call('EXISTS', stream) == 1 then return end
  redis.call('DEL', line_keys[line])
  redis.call('SREM', line_index, client)
  for i = 1, count do
    if line_numbers[i] == line and results[i][2] == IN_LINE then
      if before[i] then redis.call('SET', KEYS[i + 1], before[i], 'PX', ARGV[4]) else redis.call('DEL', KEYS[i + 1]) end
      results[i], ended[i] = {'lost', '', '', ''}, nil
      take_back(i)
    end
  end
end

local function submit_all()
  for i = 1, count do
    results[i] = submit(i)
    if results[i][2] == '' then take_back(i)
    elseif waits_in_line(i) then in_lines = in_lines + 1
    else capacity = capacity - 1 end
  end
  lengths = push_lines()
  for line, client in ipairs(line_clients) do
    if lengths[line] > 0 and lengths[line] == #line_elements[line] then withdraw_without_stream(line, client) end
  end
end

if days == 0 then
  submit_all()
else
  local done, fault = pcall(submit_all)
  for i = #results + 1, count do take_back(i) end -- none, unless a command failed
  local texts = {}
  for _, text in pairs(ended) do texts[#texts + 1] = text end
  settle(redis.call, budgets, budget_life, texts)
  if not done then error(fault) end
end
return {depth, results, budget_reply, lengths}
