-- Puts tasks in the queue, or says what is known of them.
--
-- The entry goes in first, so that the record can name it; where the task is known already, the entry is taken out
-- again before anybody can read it. A new task costs two commands.
--
-- KEYS  1 stream; then one record a task
-- ARGV  1 group; 2 room in the queue; 3 MAX_QUEUE if the depth is to be measured, else ''; 4 record's life in ms;
--       then six a task: epoch, digest, entry JSON, record JSON,
--       the epoch that is to be replaced, finished or without an entry, or '' (a failed or cancelled task
--       always comes again),
--       schema version
-- returns {depth or -1, {kind, entry id, epoch, known record} a task}
--       kind: 'new', 'again' (it was there before), 'known', 'full', 'collision', 'newer',
--       'gone' (unfinished and without an entry)
local stream, room, depth = KEYS[1], tonumber(ARGV[2]), -1
if ARGV[3] ~= '' then
  local pending = redis.pcall('XPENDING', stream, ARGV[1])
  depth = redis.call('XLEN', stream) - (pending.err and 0 or pending[1])
  room = tonumber(ARGV[3]) - depth
end

local function head(state, entry, epoch, digest)
  return '1 ' .. state .. ' ' .. entry .. ' ' .. epoch .. ' ' .. epoch .. ' ' .. digest .. '\n'
end

local function add(version, epoch, entry_json)
  return redis.call('XADD', stream, '*', 'v', version, 'g', epoch, 'd', entry_json)
end

-- What a known record means for this submit: a kind, or nil where the task is to be queued afresh.
local function judge(known, epoch, digest, replaced, version)
  local afresh = tonumber(epoch)
  if type(known) == 'table' then return nil, afresh end -- something foreign, which has no place here
  local their_version, state, their_entry, their_epoch, sequence, their_digest =
    string.match(known, '^(%d+) (%l+) (%S+) (%d+) (%d+) (%x+)[ +]*\n')
  if tonumber(their_version or string.match(known, '^(%d%d?) %l') or 0) > tonumber(version) then return 'newer' end
  if not state then return nil, afresh end -- unreadable
  if their_digest ~= digest then return 'collision' end
  if their_epoch == epoch then return 'new' end
  -- An unfinished task whose entry is gone (a stream that was deleted) would wait for ever: it comes again, but not
  -- before an instance that runs it had time to restore the entry.
  local unfinished = state == 'pending' or state == 'processing'
  local row = unfinished and redis.pcall('XRANGE', stream, their_entry, their_entry)
  if row and not row.err and #row == 1 then return 'known' end
  if unfinished and replaced ~= their_epoch then return 'gone' end
  if state == 'completed' and replaced ~= their_epoch then return 'known' end
  return nil, math.max(tonumber(epoch), tonumber(sequence) + 1)
end

local answers = {}
for i = 0, #KEYS - 2 do
  local record, at = KEYS[i + 2], 5 + i * 6
  local epoch, digest, entry_json, record_json, replaced, version =
    ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3], ARGV[at + 4], ARGV[at + 5]
  local entry, known
  if room > 0 then
    entry = add(version, epoch, entry_json)
    known = redis.pcall('SET', record, head('pending', entry, epoch, digest) .. record_json,
      'NX', 'GET', 'PX', ARGV[4])
  else
    known = redis.pcall('GET', record)
  end
  if not known then
    answers[i + 1] = entry and {'new', entry, epoch, ''} or {'full', '', '', ''}
  else
    local kind, again = judge(known, epoch, digest, replaced, version)
    if entry then redis.call('XDEL', stream, entry) end
    if kind then
      answers[i + 1] = {kind, '', epoch, type(known) == 'table' and '' or known}
    elseif room <= 0 then
      answers[i + 1] = {'full', '', '', ''}
    else
      epoch = string.format('%.0f', again)
      entry = add(version, epoch, entry_json)
      redis.call('SET', record, head('pending', entry, epoch, digest) .. record_json, 'PX', ARGV[4])
      answers[i + 1] = {'again', entry, epoch, ''}
    end
  end
  if answers[i + 1][2] ~= '' then room = room - 1 end
end
return {depth, answers}
