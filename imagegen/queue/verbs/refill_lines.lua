-- Moves tasks from lines that have stopped into the stream, unless a line has moved since it was listed.
--
-- KEYS    1 stream; 2 index of the lines; then each line
-- ARGV    1 life of a record in ms; 2 bytes after which no more is read; then three for each line: its client; tasks to
--         move; id of its first task when it was listed
-- result  number of commands; then for each line what `move` returns, without the bytes; and the tasks that are still to
--         be moved, with the id of the first one
local stream, index, bytes, commands, results = KEYS[1], KEYS[2], tonumber(ARGV[2]), 0, {}

local function first_of(line)
  commands = commands + 1
  return string.match(redis.call('LINDEX', line, 0) or '', '^%d+ %d+ %x+ (%x+)\n') or ''
end

local function refill(line, client, wanted, listed)
  if bytes <= 0 then return {0, 0, 0, {}, wanted, listed} end
  if first_of(line) ~= listed then return {0, 0, 0, {}, 0, ''} end
  local taken, is_empty, cost, moved, left = move(stream, index, line, client, wanted, ARGV[1], bytes)
  commands, bytes = commands + cost, left
  local rest = is_empty == 1 and 0 or wanted - #moved / 2
  return {taken, is_empty, cost, moved, rest, rest > 0 and first_of(line) or ''}
end

for i = 3, #KEYS do
  local at = i * 3 - 6
  results[#results + 1] = refill(KEYS[i], ARGV[at], tonumber(ARGV[at + 1]), ARGV[at + 2])
end
return {commands, results}
