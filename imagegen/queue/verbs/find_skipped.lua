-- Finds entries that the group has passed and no consumer holds, as after XGROUP SETID or DELCONSUMER by an operator:
-- no read delivers them.
--
-- KEYS    1 stream
-- ARGV    1 group; 2 lowest id; 3 number of entries to read: each comes with its request, so few are read
-- result  ids; the last id that was read, '' if there are no more; number of commands
local stream, group, page = KEYS[1], ARGV[1], tonumber(ARGV[3])
local groups = redis.pcall('XINFO', 'GROUPS', stream)
if groups.err then return {{}, '', 2} end
local last
for _, row in ipairs(groups) do
  local fields = {}
  for i = 1, #row, 2 do fields[row[i]] = row[i + 1] end
  if fields['name'] == group then last = fields['last-delivered-id'] end
end
local entries = last and redis.call('XRANGE', stream, ARGV[2], last, 'COUNT', page) or {}
if #entries == 0 then return {{}, '', 3} end
local first, final = entries[1][1], entries[#entries][1]
local held, skipped, commands = {}, {}, 4
local pending = redis.call('XPENDING', stream, group, first, final, page)
for _, row in ipairs(pending) do held[row[1]] = true end
for _, entry in ipairs(entries) do
  local id = entry[1]
  local is_held = held[id]
  if not is_held and #pending == page then -- claims of deleted entries may have filled the list
    is_held = #redis.call('XPENDING', stream, group, id, id, 1) > 0
    commands = commands + 1
  end
  if not is_held then skipped[#skipped + 1] = id end
end
return {skipped, #entries == page and final or '', commands}
